"""The log files of a job: submitit's <id>_<rank>_log.out and .err, appended to by each start of the job."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.records import Launched
from launchers.slurm import show_jobs
from launchers.status import job_statuses
from pgm_scale.errors import UserError

_POLL_S, _ASK_SLURM_S = 0.5, 5.0
_BLOCK_BYTES = 1 << 16


def log_paths(launched: Launched, rank: int) -> tuple[Path, Path]:
    """Of one task: its stdout and its stderr, where a training reports."""
    out, err = (launched.folder / f"{launched.record.job_id}_{rank}_log.{kind}" for kind in ("out", "err"))
    return out, err


def choose_job(launches: Sequence[Launched], rank: int, follows: bool) -> Launched:
    """The newest job that has written a log.

    Args:
        follows: rather one that goes on, even if it has written nothing yet.

    Raises:
        UserError: none of them has written one, or not of this rank.
    """
    candidates = (_going_on(launches) if follows else []) or launches
    for launched in reversed(candidates):
        if any(path.exists() for path in log_paths(launched, rank)):
            return launched
    newest, ranks = candidates[-1], _ranks(candidates[-1])
    if ranks:
        known = f"ranks {ranks[0]} to {ranks[-1]}"
        raise UserError(f"--rank {rank}: job {newest.record.job_id} has logs of {known}; give one of them")
    if not follows:
        raise UserError(
            f"job {newest.record.job_id} has written nothing yet; see `pgm-scale launch status`, or add --follow"
        )
    return newest


def _going_on(launches: Sequence[Launched]) -> list[Launched]:
    statuses = job_statuses(launches, show_jobs(launched.record.job_id for launched in launches))
    return [launched for launched, status in zip(launches, statuses, strict=True) if not status.has_ended]


def _ranks(launched: Launched) -> list[int]:
    pattern = re.compile(rf"{re.escape(launched.record.job_id)}_(\d+)_log\.(?:out|err)")
    names = (pattern.fullmatch(path.name) for path in launched.folder.glob("*_log.*"))
    return sorted({int(name[1]) for name in names if name is not None})


@dataclass
class _Place:
    """How far a file has been read; another inode is another file."""

    inode: int
    offset: int


class LogTail:
    """The ends of a task's files, and then what is added to them."""

    def __init__(self, launched: Launched, rank: int, lines: int) -> None:
        self.paths = log_paths(launched, rank)
        self._lines = lines
        self._places: dict[Path, _Place] = {}
        self._last: Path | None = None

    def print_new(self) -> None:
        """Print to stdout what has come since the last call; at first the last lines of each file.

        Where files take turns, a line on stderr names the one that follows.
        """
        for path in self.paths:
            data = self._new(path)
            if data and self._last not in (None, path):
                sys.stdout.flush()
                print(f"==> {path} <==", file=sys.stderr, flush=True)
            if data:
                self._last = path
                sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()

    def _new(self, path: Path) -> bytes:
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                place = self._places.get(path)
                if place is None:
                    offset = _start_of_last_lines(path, self._lines)
                elif place.inode != status.st_ino or status.st_size < place.offset:
                    offset = 0  # replaced, or cut and begun anew
                else:
                    offset = place.offset
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UserError(f"cannot read the log {path}: {error.strerror}") from None
        self._places[path] = _Place(status.st_ino, offset + len(data))
        return data


def _start_of_last_lines(path: Path, lines: int) -> int:
    """Where the last so many lines begin, read from the end: logs grow to gigabytes."""
    with open(path, "rb") as file:
        start = file.seek(0, os.SEEK_END)
        end = start
        newlines = 0
        while start:
            step = min(_BLOCK_BYTES, start)
            start -= step
            file.seek(start)
            block = file.read(step)
            for index in range(len(block) - 1, -1, -1):
                if block[index] == 0x0A and start + index != end - 1:
                    newlines += 1
                    if newlines == lines:
                        return start + index + 1
    return 0


def follow(
    tail: LogTail,
    has_ended: Callable[[], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Print what the job says until it has ended, which two answers in a row must say: a job between its time
    limit and its requeue seems to have ended."""
    answers = 0
    while answers < 2:
        answers = answers + 1 if has_ended() else 0
        for _ in range(round(_ASK_SLURM_S / _POLL_S)):
            tail.print_new()
            sleep(_POLL_S)
    tail.print_new()


def job_has_ended(launched: Launched) -> bool:
    """By Slurm, or by the job's own files where Slurm has forgotten it; a controller that is away says no."""
    try:
        return not _going_on([launched])
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return False
