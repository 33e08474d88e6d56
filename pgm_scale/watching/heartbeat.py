"""`<run>/heartbeat.json`: what a run is doing, how far it is, and in the end how it ended.

It is progress, written by the training loop itself: a run that hangs leaves an old one, and so does a run that was
killed. How old is too old is for its readers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pgm_scale.config.parsing import parse
from pgm_scale.files import check_regular, finite

HEARTBEAT_NAME = "heartbeat.json"
_MAX_BYTES = 1 << 16

ActiveState = Literal["starting", "training", "validating", "saving"]
State = Literal["starting", "training", "validating", "saving", "stopped:preempted", "failed", "finished"]


@dataclass(frozen=True)
class Heartbeat:
    """A run at one moment; None is what is not known (yet).

    Attributes:
        run: its name.
        step: finished updates, of `total_steps`.
        loss: of the newest step; the other measurements are of the newest record.
        slowest_rank_ratio: see `stragglers`.
        timeout_s: `parallel.timeout_s`: a run that makes progress beats more often.
        restarts: sessions of this run before this one.
        job: Slurm's, with the index of an array.
        exit_reason: how it ended, one line; of a failed run it starts with "unstable: ", "hung: ", "error: " (as
            the user was told) or "bug: ".
    """

    run: str
    state: State
    step: int
    total_steps: int
    unix_time_s: float
    started_unix_time_s: float
    timeout_s: float
    ranks: int
    restarts: int
    host: str
    pid: int
    job: str | None = None
    run_id: str | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    mfu: float | None = None
    validation_perplexity: float | None = None
    slowest_rank_ratio: float | None = None
    last_checkpoint_step: int | None = None
    exit_reason: str | None = None

    @property
    def is_active(self) -> bool:
        """Whether the run has said nothing of an end."""
        return self.state in get_args(ActiveState)

    def to_bytes(self) -> bytes:
        return (json.dumps(finite(dataclasses.asdict(self)), indent=1) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> Heartbeat:
        """Keys that are not known are left out: a newer version may have written them.

        Raises:
            ValueError: says in one line what is wrong.
        """
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None
        if not isinstance(tree, dict):
            raise ValueError("not a JSON object")
        names = {field.name for field in dataclasses.fields(Heartbeat)}
        problems: list[str] = []
        heartbeat = parse(Heartbeat, {key: tree[key] for key in tree if key in names}, problems)
        if problems:
            raise ValueError("; ".join(problems)[:300])
        return heartbeat


def read_heartbeat(folder: str | Path) -> Heartbeat | None:
    """The heartbeat of a run folder; None when there is none.

    Raises:
        ValueError: it is damaged or cannot be read; one line.
    """
    path = Path(folder) / HEARTBEAT_NAME
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return Heartbeat.from_bytes(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(error.strerror) from None


def job_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """Slurm's name of this job: 123, or 123_4 of an array."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    return environment.get("SLURM_JOB_ID")


def remove_unfinished(path: Path) -> None:
    """Remove what processes that died in `replace_file` have left of `path`, while no other can be in it.

    Raises:
        OSError: the folder cannot be read or written.
    """
    for temporary in path.parent.glob(f".{path.name}.*.writing"):
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Replace `path` whole, for its readers. Unlike `atomic_write_bytes` it does not wait for the disk.

    Raises:
        OSError: the old file stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.writing")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
