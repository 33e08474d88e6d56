"""How launched jobs are: what Slurm says, or what they left behind when Slurm has forgotten them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launchers.after import read_attempts
from launchers.records import Launched, LaunchRecord
from launchers.slurm import JobView
from pgm_scale.errors import HungRankError, Preempted, UnstableError, UserError
from pgm_scale.watching.heartbeat import Heartbeat, read_heartbeat

_MEANINGS = {
    1: "an error of ours or of the machine",
    UserError.exit_code: "bad input",
    UnstableError.exit_code: "a loss or gradient that is not finite, or a spike",
    HungRankError.exit_code: "a rank hung or died",
    Preempted.exit_code: "stopped by a signal after saving",
}
_FINAL_CODES = (0, UserError.exit_code, UnstableError.exit_code)  # after these a job is not requeued
_WAITING = {
    "Resources": "waits for free nodes",
    "Priority": "waits behind other jobs",
    "JobArrayTaskLimit": "waits for other jobs of its array",
    "JobHeldUser": "held by its user; scontrol release starts it",
    "JobHeldAdmin": "held by an administrator",
    "PartitionDown": "its partition is down",
    "ReqNodeNotAvail": "nodes that it needs are not available",
}
_ENDED = {
    "TIMEOUT": "the time limit was reached",
    "NODE_FAIL": "a node failed",
    "PREEMPTED": "another job took its nodes",
    "OUT_OF_MEMORY": "out of memory",
}


@dataclass(frozen=True)
class JobStatus:
    """One job.

    Attributes:
        state: Slurm's word, REQUEUED of a job that waits to be started again, UNKNOWN if nobody knows.
        reason: why, in words; empty if there is nothing to say.
        restarts, nodes, node_list, run_s, time_left_s: None or empty where Slurm has forgotten the job.
        exit_code: None before the end.
        heartbeat: of its run, for the run's newest job.
    """

    job_id: str
    name: str
    command: str
    run_folder: str | None
    state: str
    reason: str
    has_ended: bool
    restarts: int | None
    nodes: int | None
    node_list: str
    run_s: float | None
    time_left_s: float | None
    exit_code: int | None
    submitted_unix_s: float
    heartbeat: Heartbeat | None


def job_statuses(launches: Sequence[Launched], views: Mapping[str, JobView] | None) -> list[JobStatus]:
    """The status of each job, in the given order.

    Args:
        views: of `launchers.slurm.show_jobs`; None if Slurm cannot be asked.
    """
    newest = {launched.record.run_folder: launched.record.job_id for launched in launches}
    statuses = []
    for launched in launches:
        record = launched.record
        view = view_of(record, views or {})
        folder = record.run_folder
        heartbeat = _heartbeat(folder) if folder and newest[folder] == record.job_id else None
        if view is None:
            statuses.append(_from_files(launched, views is not None, heartbeat))
        else:
            statuses.append(_from_slurm(record, view, heartbeat))
    return statuses


def view_of(record: LaunchRecord, views: Mapping[str, JobView]) -> JobView | None:
    """What Slurm says of this very job: another cluster, or one that began anew, gives the same ids again."""
    view = views.get(record.job_id)
    if view is None or (view.stdout and Path(view.stdout).parent != Path(record.logs).parent):
        return None
    return view


def worth_showing(launches: Sequence[Launched]) -> list[Launched]:
    """Where no run is named: the newest job of each run or command, and all without a final record."""
    newest = {_subject(launched): launched for launched in launches}
    return [x for x in launches if newest[_subject(x)] is x or not _has_final_record(x)]


def describe_exit(code: int) -> str:
    """An exit code of ours in words."""
    if code > 128:
        return f"exit code {code}: killed by signal {code - 128}"
    return f"exit code {code}: {_MEANINGS[code]}" if code in _MEANINGS else f"exit code {code}"


def _heartbeat(run_folder: str) -> Heartbeat | None:
    """None too if it is damaged: `pgm-scale runs` says so."""
    try:
        return read_heartbeat(run_folder)
    except ValueError:
        return None


def _from_slurm(record: LaunchRecord, view: JobView, heartbeat: Heartbeat | None) -> JobStatus:
    is_requeued = view.state == "PENDING" and view.restarts > 0
    return JobStatus(
        job_id=record.job_id,
        name=record.name,
        command=" ".join(record.command),
        run_folder=record.run_folder,
        state="REQUEUED" if is_requeued else view.state,
        reason=_reason(view),
        has_ended=view.has_ended,
        restarts=view.restarts,
        nodes=view.nodes,
        node_list=view.node_list,
        run_s=view.run_s,
        time_left_s=view.time_left_s,
        exit_code=view.exit_code if view.has_ended else None,
        submitted_unix_s=record.unix_time_s,
        heartbeat=heartbeat,
    )


def _reason(view: JobView) -> str:
    if view.state == "PENDING":
        return _why_waiting(view)
    if view.state == "FAILED":
        if view.exit_signal:
            return f"killed by signal {view.exit_signal}"
        return describe_exit(view.exit_code) if view.exit_code else view.reason
    return _ENDED.get(view.state, "")


def _why_waiting(view: JobView) -> str:
    others = ", ".join(dict.fromkeys(re.findall(r":(\d+(?:_\d+|_\*)?)", view.dependency)))
    if view.reason == "Dependency":
        return f"waits for job {others}"
    if view.reason == "DependencyNeverSatisfied":
        return f"never starts: job {others} did not end well; cancel it"
    if view.reason == "BeginTime" and view.start_unix_s is not None:
        return f"starts at {datetime.fromtimestamp(view.start_unix_s):%H:%M:%S} or later"
    return _WAITING.get(view.reason, view.reason.replace("_", " "))


def _from_files(launched: Launched, was_asked: bool, heartbeat: Heartbeat | None) -> JobStatus:
    record, end = launched.record, _last_end(launched)
    forgotten = "Slurm has forgotten it" if was_asked else "Slurm cannot be asked"
    if end is None:
        traces = ("job.json", "*_log.*")
        started = any(any(launched.folder.glob(f"{record.job_id}_{trace}")) for trace in traces)
        state = "UNKNOWN"
        reason = (
            f"{forgotten}; it {'started, but left no exit code' if started else 'left no sign of a start'}"
        )
    elif end.code in _FINAL_CODES or (was_asked and end.code != Preempted.exit_code):
        state = "FAILED" if end.code else "COMPLETED"
        reason = describe_exit(end.code) if end.code else ""
    else:  # it may have been requeued
        state = "UNKNOWN"
        reason = f"{forgotten}; start {end.restart + 1} ended with {describe_exit(end.code)}"
    return JobStatus(
        job_id=record.job_id,
        name=record.name,
        command=" ".join(record.command),
        run_folder=record.run_folder,
        state=state,
        reason=reason,
        has_ended=was_asked or state != "UNKNOWN",
        restarts=None if end is None else end.restart,
        nodes=None,
        node_list="",
        run_s=None,
        time_left_s=None,
        exit_code=None if end is None else end.code,
        submitted_unix_s=record.unix_time_s,
        heartbeat=heartbeat,
    )


@dataclass(frozen=True)
class _End:
    """Of one start of a job."""

    restart: int
    code: int


def _last_end(launched: Launched) -> _End | None:
    """Of the newest start that left a record: by its batch script, else the worst of its tasks."""
    folder, job_id = launched.folder, launched.record.job_id
    try:
        attempts = read_attempts(folder / f"{job_id}_attempts.jsonl")
    except (OSError, ValueError):
        attempts = []
    by_script = _End(attempts[-1].restart, attempts[-1].code) if attempts else None
    exits = (_task_exit(path, job_id) for path in folder.glob(f"{job_id}_*_exit.json"))
    by_task = max(
        (exit for exit in exits if exit is not None),
        key=lambda exit: (exit.restart, exit.code),
        default=None,
    )
    if by_script is None or (by_task is not None and by_task.restart > by_script.restart):
        return by_task
    return by_script


def _task_exit(path: Path, job_id: str) -> _End | None:
    if not re.fullmatch(rf"{re.escape(job_id)}_\d+_exit\.json", path.name):
        return None  # of a job of the array with this id
    try:
        tree = json.loads(path.read_bytes())
        return _End(int(tree["restart"]), int(tree["code"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_final_record(launched: Launched) -> bool:
    """It ended in a way after which it is not requeued."""
    end = _last_end(launched)
    return end is not None and end.code in _FINAL_CODES


def _subject(launched: Launched) -> tuple[Path, str]:
    return launched.folder, launched.record.run_folder or launched.record.name
