"""Slurm's own programs: what they say about jobs, and cancelling.

Only scontrol, squeue and scancel are asked, which every cluster has: sacct needs an accounting data base. They
forget a job some minutes after its end (MinJobAge); then it is missing from the answers here.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from pgm_scale.errors import UserError

_TIMEOUT_S = 90.0  # Slurm's programs try again for up to a minute while the controller restarts
_UNKNOWN_JOB = "Invalid job id specified"
_ENDED = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
    *("OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"),
)
# Of these dependencies a failed job leaves its dependents waiting for ever.
_NEEDS_SUCCESS = re.compile(r"(?:afterok|aftercorr):(\d+(?:_\d+)?)")
_PROMPTS = re.compile(r"^(?:scontrol: )+")  # of a scontrol that is built without readline
_FIELD = re.compile(r"(?:^|\s)([A-Z][A-Za-z/:]*)=")


@dataclass(frozen=True)
class JobView:
    """What scontrol says of one job, or of one job of an array.

    Attributes:
        id: as Slurm writes it: 12, or 12_3 for job 3 of the array 12.
        state: PENDING, RUNNING, COMPLETED, ...; see `has_ended`.
        reason: why it waits or how it failed, in Slurm's word; empty if there is none.
        dependency: afterok:11(unfulfilled), ...; empty if there is none.
        nodes, node_list: how many it has or asks for, and which it has: node[1-2].
        restarts: how often Slurm has started it again.
        exit_code, exit_signal: of the batch script.
        run_s, limit_s: since the last start, and the most; the limit is None if there is none.
        submitted_unix_s, start_unix_s, end_unix_s: None if not known yet; those of a waiting or running job are
            Slurm's plan.
        stdout: file of the batch script's output; empty if Slurm does not say.
    """

    id: str
    name: str
    state: str
    reason: str
    dependency: str
    nodes: int
    node_list: str
    restarts: int
    exit_code: int
    exit_signal: int
    run_s: float
    limit_s: float | None
    submitted_unix_s: float | None
    start_unix_s: float | None
    end_unix_s: float | None
    stdout: str

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def time_left_s(self) -> float | None:
        """Of a running job, until its time limit; None if it does not run or has no limit."""
        if self.state != "RUNNING" or self.limit_s is None:
            return None
        return max(0.0, self.limit_s - self.run_s)


def show_jobs(ids: Iterable[str]) -> dict[str, JobView]:
    """The views of those of the jobs that Slurm still knows, by id: one call, however many.

    Raises:
        UserError: no Slurm here, or its controller does not answer.
    """
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return {}
    arrays = dict.fromkeys(id.partition("_")[0] for id in wanted)
    # Given on stdin, as its `show job` takes one id. --all: also jobs in hidden partitions.
    done = _run(["scontrol", "--all", "--oneliner"], "".join(f"show job {array}\n" for array in arrays))
    found: dict[str, JobView] = {}
    for line in done.stdout.splitlines():
        line = _PROMPTS.sub("", line)
        if line.startswith("JobId="):
            for view in parse_job(line):
                found.setdefault(view.id, view)
    errors = [line for line in done.stderr.splitlines() if line.strip() and _UNKNOWN_JOB not in line]
    if errors and not all(id in found for id in wanted):
        raise UserError(f"scontrol cannot show jobs: {errors[-1].strip()}")
    return {id: found[id] for id in wanted if id in found}


def parse_job(line: str) -> Iterator[JobView]:
    """A line of `scontrol --oneliner show job`: one job, or the waiting jobs of an array, which share a line.

    Raises:
        UserError: it is not such a line.
    """
    fields = _fields(line)
    try:
        view = _view(fields)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"cannot read what scontrol says of a job ({type(error).__name__}: {error}): {line[:200]}"
        ) from None
    if "ArrayTaskId" not in fields:
        yield view
        return
    for index in _array_indices(fields["ArrayTaskId"]):
        yield JobView(**{**vars(view), "id": f"{fields['ArrayJobId']}_{index}"})


def needed_jobs() -> dict[str, tuple[str, ...]]:
    """The user's waiting jobs that need others to succeed, and those others' ids (an array's without index).

    Raises:
        UserError: no Slurm here, or its controller does not answer.
    """
    done = _run(["squeue", "--all", "--me", "--noheader", "--array", "--states=PENDING", "--format=%i|%E"])
    _check(done)
    needed = {}
    for line in done.stdout.splitlines():
        id, _, dependency = line.strip().partition("|")
        others = tuple(_NEEDS_SUCCESS.findall(dependency))
        if others:
            needed[id] = others
    return needed


def cancel_jobs(ids: Iterable[str]) -> None:
    """Waiting jobs go away; running ones get SIGTERM, and SIGKILL after the cluster's KillWait. Ended ones stay.

    First each is told not to be requeued: else a batch script that requeues its job would undo the cancellation.

    Raises:
        UserError: Slurm refuses, as for somebody else's job.
    """
    words = list(ids)
    if words:
        _run(["scontrol"], "".join(f"update JobId={id} Requeue=0\n" for id in words))
        _check(_run(["scancel", *words]))


def _run(command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env=_environment(os.environ),
        )
    except FileNotFoundError:
        raise UserError(
            f"no Slurm here ({command[0]} not found): run this on a login node, or put Slurm's programs on PATH"
        ) from None
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} gave no answer in {_TIMEOUT_S:.0f} s: Slurm's controller is away; try again later"
        ) from None


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The user's, without what changes the form of the answers."""
    changes = ("SQUEUE_", "SCANCEL_", "SLURM_TIME_FORMAT")
    return {name: value for name, value in environment.items() if not name.startswith(changes)}


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {done.returncode}"
        raise UserError(f"{done.args[0]} failed: {said}")


def _fields(line: str) -> dict[str, str]:
    """The first value of each key; a value ends at the next key, as names and commands may hold spaces."""
    name = re.search(r"\sJobName=(.*?)\sUserId=", line)
    fields = {"JobName": name.group(1)} if name else {}
    if name:  # a job may have any name
        line = line[: name.start()] + line[name.end() - len(" UserId=") :]
    keys = list(_FIELD.finditer(line))
    ends = [key.start() for key in keys[1:]] + [len(line)]
    for key, end in zip(keys, ends, strict=True):
        value = line[key.end() : end].strip()
        fields.setdefault(key.group(1), "" if value in ("(null)", "None", "N/A") else value)
    return fields


def _view(fields: Mapping[str, str]) -> JobView:
    code, _, signal = fields["ExitCode"].partition(":")
    return JobView(
        id=fields["JobId"],
        name=fields["JobName"],
        state=fields["JobState"],
        reason=fields["Reason"],
        dependency=fields["Dependency"],
        nodes=int(fields["NumNodes"].partition("-")[0]),  # 2-4 is asked for
        node_list=fields["NodeList"],
        restarts=int(fields["Restarts"]),
        exit_code=int(code),
        exit_signal=int(signal or 0),
        run_s=_seconds(fields["RunTime"]) or 0.0,
        limit_s=_seconds(fields["TimeLimit"]),
        submitted_unix_s=_unix_s(fields["SubmitTime"]),
        start_unix_s=_unix_s(fields["StartTime"]),
        end_unix_s=_unix_s(fields["EndTime"]),
        stdout=fields.get("StdOut", ""),
    )


def _seconds(text: str) -> float | None:
    """Of D-HH:MM:SS; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _unix_s(text: str) -> float | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").timestamp()
    except ValueError:  # Unknown
        return None


def _array_indices(text: str) -> Iterator[int]:
    """Of 3, or of 0,4-9:3%2 (at most 2 at a time). Slurm cuts a long list (...): the rest is not known."""
    for part in text.partition("%")[0].split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if found is not None:
            first, last, step = found.groups()
            yield from range(int(first), int(last or first) + 1, int(step or 1))
