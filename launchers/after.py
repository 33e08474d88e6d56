"""`python -m launchers.after`: in the batch script, when all tasks have ended: what becomes of the job.

Prints the commands of Slurm to run, for the script to evaluate: in a container there is no scontrol. Says on
stderr why. A job is requeued once, by its batch script, whatever ended its tasks:

- stopped by a signal after saving (exit code 75), a rank that hung or died (4, or above 128), or an error of ours
  or of the machine (1): requeued, unless that has been so for several attempts without a new checkpoint;
- bad input (2), a loss that is not finite (3): not requeued;
- at its time limit a command that would begin anew: not requeued;
- Slurm is cancelling or requeuing the job itself: left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgm_scale.errors import Preempted, UnstableError, UserError

PREFLIGHT_REPORT = "preflight.json"
_GOES_ON = ("train", "distill", "prepare")  # started again, these do not begin anew
_FINAL = {
    0: "done",
    UserError.exit_code: "bad input",
    UnstableError.exit_code: "a loss or gradient that is not finite, or a spike",
}
_NODE = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Attempt:
    """One start of a job, when it has ended.

    Attributes:
        step: the newest checkpoint of its run then; -1 where there is none.
    """

    restart: int
    code: int
    step: int
    unix_time_s: float


@dataclass(frozen=True)
class Decision:
    commands: tuple[str, ...]
    reason: str
    is_crash_loop: bool = False


def decide(
    code: int,
    state: str,
    job_id: str,
    attempts: list[Attempt],
    most_restarts: int,
    goes_on: bool = True,
) -> Decision:
    """Whether to requeue.

    Args:
        code: srun's exit code, the highest of the tasks'.
        state: the line of `scontrol --oneliner show job`.
        job_id: 12, or 12_3 of an array, whose jobs would all be requeued by a number alone.
        attempts: of this job, the one that has just ended last.
        goes_on: the command, started again, goes on where it was.
    """
    if code in _FINAL:
        return Decision((), f"not requeued: {_FINAL[code]} (exit code {code})")
    if not _may_requeue(state):
        by_slurm = _is_started_again(state)
        return Decision(
            (), "requeued by Slurm itself" if by_slurm else "not requeued: the job is cancelled or has ended"
        )
    if not goes_on and _field(state, "Reason") == "TimeLimit":
        return Decision((), "not requeued: its time limit was reached; launch it with a longer --time")
    idle = 0
    for attempt in reversed(attempts):
        idle += attempt.step == attempts[-1].step
        if attempt.step != attempts[-1].step:
            break
    # Of a single attempt that has ended by a save nobody can say that it made no progress.
    if idle > max(most_restarts, code == Preempted.exit_code):
        return Decision(
            (),
            f"not requeued: {idle} attempts in a row ended (the last with exit code {code}) without a new "
            "checkpoint; look at the logs, then launch the same command again",
            is_crash_loop=True,
        )
    return Decision((f"scontrol requeue {job_id}",), f"requeued after exit code {code}")


def _may_requeue(state: str) -> bool:
    """While Slurm ends the job itself, requeuing would undo a cancellation or count twice."""
    job_state, reason = _field(state, "JobState"), _field(state, "Reason")
    return job_state == "RUNNING" or (job_state in ("COMPLETING", "TIMEOUT") and reason == "TimeLimit")


def _field(line: str, name: str) -> str:
    found = re.search(rf"(?:^|\s){name}=(\S+)", line)
    return found[1] if found else "nothing"


@dataclass(frozen=True)
class NextJobs:
    """What waits for a preflight.

    Attributes:
        exclude: the nodes that it leaves out already, as Slurm writes them.
    """

    ids: tuple[str, ...]
    exclude: str = ""


def exclude_bad_nodes(bad_nodes: list[str], next_jobs: NextJobs, code: int) -> Decision:
    """After a preflight: keep the jobs that wait for it away from bad nodes, or end them if it failed otherwise."""
    if code == 0:
        return Decision((), "preflight ended well")
    if not bad_nodes or not all(map(_NODE.fullmatch, bad_nodes)):
        return Decision(
            tuple(f"scancel {job}" for job in next_jobs.ids),
            f"preflight failed (exit code {code}) and named no node: cancelled what follows",
        )
    nodes = ",".join(filter(None, (next_jobs.exclude, *bad_nodes)))
    return Decision(
        tuple(f"scontrol update JobId={job} ExcNodeList={shlex.quote(nodes)}" for job in next_jobs.ids),
        f"the jobs that follow leave out {nodes}",
    )


def bad_nodes_of(folder: Path, job: str) -> list[str]:
    """Of the job's own report: an older one, of a preflight before, says nothing about this one."""
    report = folder / PREFLIGHT_REPORT
    try:
        if report.stat().st_mtime_ns < _job_path(folder, job).stat().st_mtime_ns:
            return []
        return [str(node) for node in json.loads(report.read_text())["bad_nodes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_started_again(state: str) -> bool:
    """By Slurm itself, after a node has failed or another job has taken the nodes."""
    restarts = _field(state, "Restarts")
    return restarts.isdecimal() and int(restarts) > _restart()


def _restart() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def record_attempt(folder: Path, job: str, code: int, run_folder: str | None) -> list[Attempt]:
    """Add the attempt that has ended to <job>_attempts.jsonl; returns all of this job."""
    path = folder / f"{job}_attempts.jsonl"
    attempts = read_attempts(path)
    attempts.append(Attempt(_restart(), code, newest_step(run_folder), time.time()))
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(vars(attempts[-1])) + "\n")
    return attempts


def read_attempts(path: Path) -> list[Attempt]:
    attempts = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            attempts.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # cut by a full disk
    return attempts


def newest_step(run_folder: str | None) -> int:
    """By the names of the step folders: reading them needs no torch, which takes seconds to import."""
    if run_folder is None:
        return -1
    names = (path.name for path in (Path(run_folder) / "checkpoints").glob("step_*"))
    return max((int(name.removeprefix("step_")) for name in names if name[5:].isdecimal()), default=-1)


def _job_path(folder: Path, job: str) -> Path:
    return folder / f"{job}_job.json"


def _job_file(folder: Path, job: str) -> dict[str, Any]:
    try:
        return dict(json.loads(_job_path(folder, job).read_text()))
    except (OSError, ValueError, TypeError):
        return {}  # no task has come so far


def _alert(run_folder: Path, reason: str) -> None:
    """Tell whom the run tells of its events."""
    from pgm_scale import config as configuration
    from pgm_scale.watching.alerts import alert

    try:
        config = configuration.load(run_folder / "config.yaml")
    except UserError as error:
        print(f"nobody is alerted: {error}", file=sys.stderr)
        return
    alert(config.watching, "crash_loop", run_folder, reason)


def _decide(options: argparse.Namespace, job: str, about: dict[str, Any]) -> Decision:
    attempts = record_attempt(options.folder, job, options.exit_code, about.get("run_folder"))
    next_jobs = options.folder / f"{job}_next.json"
    if not next_jobs.exists():
        goes_on = about.get("words", _GOES_ON)[0] in _GOES_ON
        return decide(options.exit_code, options.state, job, attempts, options.restarts, goes_on)
    if _is_started_again(options.state):
        return Decision((), "the preflight is started again by Slurm")
    waiting = NextJobs(**json.loads(next_jobs.read_text()))
    return exclude_bad_nodes(bad_nodes_of(options.folder, job), waiting, options.exit_code)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="submitit's folder")
    parser.add_argument("--exit-code", type=int, required=True, help="of srun")
    parser.add_argument("--state", required=True, help="what `scontrol --oneliner show job` says")
    parser.add_argument(
        "--restarts", type=int, required=True, help="at most so many without a new checkpoint"
    )
    options = parser.parse_args()
    from launchers.job import slurm_job_name

    job = slurm_job_name(os.environ)
    about = _job_file(options.folder, job)
    try:
        decision = _decide(options, job, about)
    except OSError as error:  # without its attempts, a crash loop would never stop
        print(f"{job}: not requeued: {options.folder} cannot be used ({error.strerror})", file=sys.stderr)
        return 0
    print(f"{job}: {decision.reason}", file=sys.stderr)
    if decision.is_crash_loop and about.get("run_folder"):
        _alert(Path(about["run_folder"]), decision.reason)
    for command in decision.commands:
        print(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
