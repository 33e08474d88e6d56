"""The work folder: one process a rank at a time, the step that all ranks sample from, and files written whole.

    <work>/rank_00000.lock        held by the process of rank 0 while it evaluates
    <work>/step-<run id>.json     the step of that run which rank 0 has chosen; who goes on keeps to it
    <work>/remote                 what was fetched of remote splits
    <work>/<kind>-<fingerprint>   see `chunks`

Ranks on several nodes need one file system for it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.errors import HungRankError, UserError
from pgm_scale.files import atomic_write_bytes
from pgm_scale.parallel.launch import Launch
from pgm_scale.run_folder import RunFolder

_POLL_S = 0.2

_log = logging.getLogger(__name__)


def write_file(path: Path, data: bytes) -> None:
    """Whole or not at all. Raises: UserError: disk full, no permission, ..."""
    try:
        atomic_write_bytes(path, data)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room or choose another place, "
            "and start the same command again"
        ) from None


@contextmanager
def only_process(work: Path, launch: Launch) -> Iterator[None]:
    """Hold this rank's place in the work folder; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    path = work / f"rank_{launch.rank:05d}.lock"
    try:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"--work: cannot write {path} ({error.strerror}); choose another folder") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--work {work}: another process is evaluating here as rank {launch.rank}; "
                "wait for it to end, or choose another folder"
            ) from None
        except OSError:
            pass  # some network file systems have no such lock
        yield
    finally:
        os.close(descriptor)


def chosen_step(run_folder: str, work: Path, launch: Launch, timeout_s: float) -> int:
    """The step to sample from: what was chosen in this work folder before, or else rank 0's newest good one.

    Training may go on meanwhile: without a choice that is kept, ranks and those who go on would each find another.

    Raises:
        UserError: the run has no good checkpoint, or no longer the one that was chosen.
        HungRankError: rank 0 has not chosen for `timeout_s`.
    """
    path = work / f"step-{RunFolder(run_folder).identity().run_id}.json"
    store = CheckpointStore(run_folder)
    if not path.exists() and launch.rank == 0:
        newest = store.newest_verified(repair=False)
        if newest is None:
            raise _no_checkpoint(run_folder)
        write_file(path, json.dumps({"step": newest}).encode() + b"\n")
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        if not store.steps():
            raise _no_checkpoint(run_folder)
        if time.monotonic() > deadline_s:
            raise HungRankError(
                f"{path}: rank 0 has not chosen a step for {timeout_s:.0f} s; "
                "see what became of it and start the same command again"
            )
        time.sleep(_POLL_S)
    step, steps = _read_step(path), store.steps()
    if step not in steps:
        raise UserError(
            f"{path} keeps to step {step}, which {run_folder} no longer has; "
            "name another with --step, or choose a new --work"
        )
    if launch.rank == 0 and steps[-1] > step:
        _log.warning("%s keeps to step %d; for step %d add --step %d", path, step, steps[-1], steps[-1])
    return step


def _no_checkpoint(run_folder: str) -> UserError:
    return UserError(f"{run_folder} has no checkpoint yet; train it first (pgm-scale train)")


def _read_step(path: Path) -> int:
    try:
        return int(json.loads(path.read_bytes())["step"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, or name a step with --step") from None
