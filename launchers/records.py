"""What was launched: a line in launches.jsonl beside the files of each job, written when it is submitted.

    runs/owt/jobs/                jobs of the run owt: submitit's files and logs, and launches.jsonl
    runs/owt-sweep/jobs/          of a sweep: one line for each of its runs
    jobs/prepare/                 of a command that has no run

Jobs that ran here (--local) are not in it: they have no id of Slurm's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import getpass
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgm_scale import config as configuration
from pgm_scale.errors import UserError

LAUNCHES_NAME = "launches.jsonl"
_ROOTS = (Path("runs"), Path("jobs"))
_PLACES = ("*/jobs", "*/*/jobs", "*")  # of jobs folders below a root


def user_name() -> str:
    """Of this user; the number where the system has no name for it, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@dataclass(frozen=True)
class LaunchRecord:
    """One job, or one job of an array.

    Attributes:
        job_id: 12, or 12_3 for job 3 of the array 12; submitit's files of the job begin with it.
        command: the words behind `pgm-scale`.
        run_folder: of a training, absolute.
        logs: pattern of the log files, absolute: .../jobs/12_*_log.*
        sbatch: the file that was submitted.
        cluster: the cluster file.
        after: the jobs that it waits for.
    """

    job_id: str
    name: str
    command: tuple[str, ...]
    run_folder: str | None
    logs: str
    sbatch: str
    cluster: str
    after: tuple[str, ...] = ()
    user: str = field(default_factory=user_name)
    unix_time_s: float = field(default_factory=time.time)

    @property
    def array_index(self) -> int | None:
        index = self.job_id.partition("_")[2]
        return int(index) if index.isdecimal() else None


@dataclass(frozen=True)
class Launched:
    """A record and the folder in which it was found, which may have moved since."""

    folder: Path
    record: LaunchRecord


def append_launches(folder: Path, records: Iterable[LaunchRecord]) -> None:
    """Add lines to the folder's launches.jsonl: all in one write, under a lock, after a line that was cut.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [json.dumps(_to_json(record)) + "\n" for record in records]
    path = folder / LAUNCHES_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            with contextlib.suppress(OSError):  # some network file systems have no such lock
                fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
            cut = bool(size) and file.read(1) != b"\n"
            file.write(("\n" * cut + "".join(lines)).encode())
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): the jobs are submitted, "
            "but `launch status` will not know them"
        ) from None


def read_launches(folder: Path) -> list[Launched]:
    """The folder's records, oldest first; lines that cannot be read, such as a cut last one, are left out."""
    try:
        text = (folder / LAUNCHES_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    records = (_parse(line) for line in text.splitlines())
    return [Launched(folder, record) for record in records if record is not None]


def find_launches(selection: Sequence[str] = ()) -> list[Launched]:
    """The jobs of runs, folders or ids, oldest first; of everything below ./runs and ./jobs if none is given.

    Args:
        selection: run folders or their names below ./runs, folders with a launches.jsonl, or job ids (an array's
            id means all its jobs).

    Raises:
        UserError: nothing was launched for one of them.
    """
    everywhere = [launched for root in _ROOTS for launched in _below(root)]
    if not selection:
        return _ordered(everywhere)
    found = []
    for word in selection:
        launches = _of(word, everywhere)
        if not launches:
            raise UserError(
                f"{word}: nothing was launched for it; give a run folder, its name below ./runs, or the id of a "
                "job that is listed by `pgm-scale launch status`"
            )
        found += launches
    return _ordered(found)


def of_job(launches: Sequence[Launched], job_id: str | None, where: str) -> list[Launched]:
    """Those with the id, or all if there is none.

    Raises:
        UserError: no job has it.
    """
    chosen = [launched for launched in launches if job_id in (None, *_ids(launched.record))]
    if not chosen:
        known = ", ".join(launched.record.job_id for launched in launches)
        raise UserError(f"--job {job_id}: not a job of {where}; its jobs are {known}")
    return chosen


def _ids(record: LaunchRecord) -> tuple[str, str]:
    """Of the job, and of its array."""
    return record.job_id, record.job_id.partition("_")[0]


def _of(word: str, everywhere: list[Launched]) -> list[Launched]:
    by_id = [launched for launched in everywhere if word in _ids(launched.record)]
    if by_id:
        return by_id
    for folder in (Path(word), Path("runs", word), Path("jobs", word)):
        launches = _of_folder(folder.absolute())
        if launches:
            return launches
    return []


def _of_folder(folder: Path) -> list[Launched]:
    """Of a run or a sweep (in its jobs folder), of a jobs folder, or of a run that a sweep beside it launched."""
    swept = [
        launched
        for jobs in folder.parent.glob("*-sweep/jobs")
        for launched in read_launches(jobs)
        if launched.record.run_folder and Path(launched.record.run_folder).resolve() == folder.resolve()
    ]
    return [*read_launches(folder / "jobs"), *read_launches(folder), *swept]


def _below(root: Path) -> list[Launched]:
    root = root.absolute()
    folders = {path.parent for place in _PLACES for path in root.glob(f"{place}/{LAUNCHES_NAME}")}
    return [launched for folder in sorted(folders) for launched in read_launches(folder)]


def _ordered(launches: list[Launched]) -> list[Launched]:
    unique = {(launched.folder, launched.record.job_id): launched for launched in launches}
    return sorted(unique.values(), key=lambda launched: launched.record.unix_time_s)


def _to_json(record: LaunchRecord) -> dict[str, Any]:
    return {**dataclasses.asdict(record), "array_index": record.array_index}


def _parse(line: str) -> LaunchRecord | None:
    known = [spec.name for spec in dataclasses.fields(LaunchRecord)]
    try:
        tree = json.loads(line)
        tree = {name: tree[name] for name in known}
    except (ValueError, KeyError, TypeError):
        return None
    problems: list[str] = []
    return configuration.parse(LaunchRecord, tree, problems)
