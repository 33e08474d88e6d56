"""What the run folders on a disk say of their runs; read from small files only, and nothing heavy is imported.

A run says itself what it is at. Whether that still holds is told by the age of its heartbeat and by its lock, whose
holder can be asked for on the same machine and touches it every 10 s elsewhere (`pgm_scale.checkpoint.lock`).
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pgm_scale.errors import UserError
from pgm_scale.holder import Holder
from pgm_scale.watching.heartbeat import HEARTBEAT_NAME, Heartbeat, read_heartbeat

State = Literal[
    "starting",
    "running",
    "stalled",
    "preempted",
    "finished",
    "failed",
    "killed",
    "stopped",
    "never started",
    "damaged",
]
_MARGIN_S = 60.0  # over the run's own time-out, before a heartbeat is old: a clock may be off
_LOCK_DEAD_S = 90.0  # as the lock judges
_MAX_DEPTH = 4
_TAIL_BYTES = 1 << 18
_CONFIG_BYTES = 1 << 14  # ours have 2 thousand; the parser takes the square of it for nested brackets
_STEP_NAME = re.compile(r"step_(\d{8,})")
# The parser in C is ten times as fast.
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunStatus:
    """One run; None is what is not known.

    Attributes:
        doing: what a running run says that it does: training, validating or saving.
        step: finished updates, of `total_steps`.
        job: Slurm's, of the newest session.
        restarts: sessions before the newest one.
        updated_unix_time_s: when the run last said something.
        note: how it ended, or what is wrong with its files; one line.
    """

    folder: str
    run: str
    state: State
    doing: str | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    validation_perplexity: float | None = None
    last_checkpoint_step: int | None = None
    last_checkpoint_unix_time_s: float | None = None
    job: str | None = None
    restarts: int | None = None
    updated_unix_time_s: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Lock:
    """A run's lock: whether its holder lives (None: it is on another machine), and for how long it said nothing."""

    lives: bool | None
    age_s: float


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The run folders among `folders` and below them, by name.

    Raises:
        UserError: one of `folders` is no folder.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give folders of runs, or folders that hold such")
        found |= dict.fromkeys(_runs_below(folder, _MAX_DEPTH))
    return list(found)


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        if any(entry.name in ("run.json", "config.yaml", HEARTBEAT_NAME) for entry in entries):
            yield folder
            return
        below = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:  # somebody else's, or deleted meanwhile
        return
    for name in below if depth > 0 else ():
        yield from _runs_below(folder / name, depth - 1)


def read_status(folder: Path, now_s: float | None = None) -> RunStatus:
    """Of one run folder; whatever is in it, there is a status, and no error."""
    now_s = time.time() if now_s is None else now_s
    steps, saved_unix_time_s = _checkpoints(folder)
    lock = _lock(folder, now_s)
    checkpoint = steps[-1] if steps else None
    try:
        heartbeat = read_heartbeat(folder)
    except ValueError as error:
        note = f"{HEARTBEAT_NAME}: {error}"
        return _status_of_files(folder, checkpoint, saved_unix_time_s, lock, note)
    if heartbeat is None:
        return _status_of_files(folder, checkpoint, saved_unix_time_s, lock)
    perplexity = heartbeat.validation_perplexity  # of this session
    if perplexity is None:
        perplexity = _number(_last_records(folder).get("validation_perplexity"))
    return RunStatus(
        folder=str(folder),
        run=heartbeat.run,
        state=judge(heartbeat, lock, now_s),
        doing=heartbeat.state if heartbeat.is_active else None,
        step=heartbeat.step,
        total_steps=heartbeat.total_steps,
        loss=heartbeat.loss,
        tokens_per_second=heartbeat.tokens_per_second,
        validation_perplexity=perplexity,
        last_checkpoint_step=checkpoint,
        last_checkpoint_unix_time_s=saved_unix_time_s,
        job=heartbeat.job,
        restarts=heartbeat.restarts,
        updated_unix_time_s=heartbeat.unix_time_s,
        note=heartbeat.exit_reason,
    )


def judge(heartbeat: Heartbeat, lock: Lock | None, now_s: float) -> State:
    """What has become of the run that wrote `heartbeat`; `now_s` is Unix time."""
    if heartbeat.state == "stopped:preempted":
        return "preempted"
    if heartbeat.state == "finished" or heartbeat.state == "failed":
        return heartbeat.state
    if lock is not None and lock.lives is False:
        return "killed"
    if now_s - heartbeat.unix_time_s <= heartbeat.timeout_s + _MARGIN_S:
        return "starting" if heartbeat.state == "starting" else "running"
    if lock is None or (lock.lives is None and lock.age_s > _LOCK_DEAD_S + _MARGIN_S):
        return "killed"
    return "stalled"


def _status_of_files(
    folder: Path,
    checkpoint: int | None,
    saved_unix_time_s: float | None,
    lock: Lock | None,
    damage: str | None = None,
) -> RunStatus:
    """Of a run without a good heartbeat: it never came so far, an older version trained it, or it has `damage`."""
    name, total, problem = _configured(folder)
    records = _last_records(folder)
    note = damage or problem
    state: State
    if lock is not None:
        lives = lock.age_s <= _LOCK_DEAD_S + _MARGIN_S if lock.lives is None else lock.lives
        state = "running" if lives else "killed"
    elif note is not None:
        state = "damaged"
    elif checkpoint is None and not records:
        state = "never started"
    else:
        state = "finished" if checkpoint == total else "stopped"
    return RunStatus(
        folder=str(folder),
        run=name,
        state=state,
        step=_whole(records.get("step")),
        total_steps=total,
        loss=_number(records.get("loss")),
        tokens_per_second=_number(records.get("tokens_per_second")),
        validation_perplexity=_number(records.get("validation_perplexity")),
        last_checkpoint_step=checkpoint,
        last_checkpoint_unix_time_s=saved_unix_time_s,
        updated_unix_time_s=_number(records.get("unix_time_s")),
        note=note,
    )


def _configured(folder: Path) -> tuple[str, int | None, str | None]:
    """Name and total steps of the run's configuration, and what is wrong with it."""
    try:
        with open(folder / "config.yaml", "rb") as file:
            tree = yaml.load(file.read(_CONFIG_BYTES), _YAML)
        name, total = tree.get("name", "run"), _whole(tree.get("training", {}).get("steps"))
    except FileNotFoundError:
        return folder.name, None, "config.yaml: missing"
    except OSError as error:
        return folder.name, None, f"config.yaml: {error.strerror}"
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
        return folder.name, None, "config.yaml: no configuration of a run"
    return str(name), total, None


def _checkpoints(folder: Path) -> tuple[list[int], float | None]:
    """The committed steps in ascending order, and when the newest was written."""
    try:
        with os.scandir(folder / "checkpoints") as entries:
            found = {int(match[1]): entry for entry in entries if (match := _STEP_NAME.fullmatch(entry.name))}
        return sorted(found), found[max(found)].stat().st_mtime if found else None
    except OSError:
        return [], None


def _lock(folder: Path, now_s: float) -> Lock | None:
    try:
        with open(folder / "run.lock", "rb") as file:
            holder = Holder.from_bytes(file.read(4096))
            age_s = now_s - os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    return Lock(None if holder is None else holder.lives(), age_s)


def _last_records(folder: Path) -> dict[str, Any]:
    """The newest record of metrics.jsonl, with the newest validation's perplexity; empty when there is none."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES)
            file.seek(start)
            lines = file.read(_TAIL_BYTES).split(b"\n")
    except OSError:
        return {}
    newest: dict[str, Any] = {}
    for line in reversed(lines):
        if newest and b'"validation_perplexity"' not in line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut by the writer's death, or by where the tail begins
        if not isinstance(record, dict):
            continue
        newest = newest or record
        if _number(record.get("validation_perplexity")) is not None:
            return {**newest, "validation_perplexity": record["validation_perplexity"]}
    return newest


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None
