"""What a job asks of its cluster: the `slurm` section of a cluster file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pgm_scale.config import parse, read_yaml
from pgm_scale.errors import UserError
from pgm_scale.secrets import names_secret

# Not MM:SS, which Slurm knows too and people take for HH:MM.
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d{1,2}):(?P<seconds>\d{1,2})")
_GPUS_OF_GRES = re.compile(r"gpu(?::[A-Za-z][^:,(]*)?(?::(\d+))?(?:\(.*\))?")
# What the launcher itself tells sbatch; another value would lose logs, signals or the order of a chain.
_TAKEN = (
    *("array", "dependency", "error", "job-name", "mem", "ntasks", "ntasks-per-node", "open-mode", "output"),
    *("requeue", "signal", "kill-on-invalid-dep"),
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class SlurmJob:
    """One job: what sbatch and srun are asked for, and what is set before the command.

    Attributes:
        tasks_per_node: processes of a node; None is one a GPU, and one on a node without.
        memory_gb_per_node: 0 is all of it; None does not ask.
        time: of the job, as HH:MM:SS, D-HH:MM:SS or minutes.
        gres: asks for the GPUs instead of --gpus-per-node, where a cluster wants it so (gpu:a100:4).
        launcher: srun starts each process; with torchrun srun starts one torchrun a node, which starts them.
        container: stands before the Python command (apptainer exec --nv pgm-scale.sif). Pyxis goes into `srun`.
        python: the interpreter on the nodes; None is the one that submits.
        signal_before_s: how long before the time limit a training is told to save and be requeued.
        exit_grace_s: how long the other tasks may go on when one has ended; then Slurm ends them.
        restarts_without_progress: so often a job that fails is requeued without a new checkpoint in between.
        sbatch, srun: further options, by name without the dashes (one that takes no value has ""), and as words.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    memory_gb_per_node: int | None = None
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    exclude: str | None = None
    exclusive: bool = False
    launcher: Literal["srun", "torchrun"] = "srun"
    container: str | None = None
    python: str | None = None
    modules: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    signal_before_s: int = 120
    exit_grace_s: int = 120
    restarts_without_progress: int = 3
    sbatch: dict[str, str] = field(default_factory=dict)
    srun: tuple[str, ...] = ()

    @property
    def processes_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def slurm_tasks_per_node(self) -> int:
        return 1 if self.launcher == "torchrun" else self.processes_per_node

    @property
    def minutes(self) -> int:
        """Of `time`, rounded up, as submitit takes it."""
        return minutes_of(self.time)


def minutes_of(time: str) -> int:
    """Raises: ValueError: not a time of Slurm's."""
    if time.isascii() and time.isdecimal():
        return int(time)
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(time)
    days, hours, minutes, seconds = (
        int(found[part] or 0) for part in ("days", "hours", "minutes", "seconds")
    )
    return (days * 24 + hours) * 60 + minutes + (seconds > 0)


def load_slurm_job(
    path: str | Path,
    command: str,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    commands: Iterable[str] | None = None,
) -> SlurmJob:
    """The `slurm` section of a cluster file for one command.

    Later ones win: the section, which is of trainings, `defaults` of another command, the section's
    `jobs.<command>`, `settings` of the command line.

    Args:
        commands: that can be jobs; others below `jobs` are mistakes.

    Raises:
        UserError: one line for each problem.
    """
    section = read_yaml(path).get("slurm")
    if not isinstance(section, dict):
        raise UserError(f"{path} has no `slurm` section; give a cluster file with one (configs/clusters/)")
    tree, problems = dict(section), list[str]()
    jobs = tree.pop("jobs", {})
    if not isinstance(jobs, dict) or not all(isinstance(part, dict) for part in jobs.values()):
        raise UserError(f"{path}: slurm.jobs: expected a mapping of commands to mappings, found {jobs!r}")
    tree |= dict(defaults or {})
    tree |= jobs.get(command, {}) | dict(settings)
    if type(tree.get("time")) is int:
        tree["time"] = str(tree["time"])
    problems += _unknown_jobs(jobs, commands)
    job = parse(SlurmJob, tree, problems, "slurm")
    if job is not None:
        problems += _problems(job)
    if job is None or problems:
        raise UserError(
            f"{path}: {len(problems)} problem(s) in the slurm section for {command}:\n  "
            + "\n  ".join(problems)
        )
    return job


def _unknown_jobs(jobs: Mapping[str, Mapping[str, Any]], commands: Iterable[str] | None) -> Iterator[str]:
    """Mistakes in the parts of other commands too, which would be found when those are launched, or never."""
    known = None if commands is None else tuple(commands)
    for name, part in jobs.items():
        if known is not None and name not in known:
            yield f"slurm.jobs.{name}: no command that can be launched; known are {', '.join(known)}"
        for key in part:
            if key not in SlurmJob.__dataclass_fields__:
                yield f"slurm.jobs.{name}.{key}: unknown key; the keys are those of the slurm section"


def _problems(job: SlurmJob) -> list[str]:
    problems = [
        f"slurm.{name}: {getattr(job, name)} must be at least {least}"
        for name, least in (
            ("nodes", 1),
            ("gpus_per_node", 0),
            ("tasks_per_node", 1),
            ("cpus_per_task", 1),
            ("memory_gb_per_node", 0),
            ("signal_before_s", 0),
            ("exit_grace_s", 1),
            ("restarts_without_progress", 0),
        )
        if getattr(job, name) is not None and getattr(job, name) < least
    ]
    problems += [
        f"slurm.environment.{name}: a secret would be in the sbatch text: set it in the shell that launches, whose "
        "environment sbatch hands on"
        for name in job.environment
        if names_secret(name)
    ]
    problems += [
        f"slurm.environment: {name!r} is not a variable's name"
        for name in job.environment
        if not _VARIABLE.fullmatch(name)
    ]
    problems += [
        f"slurm.sbatch: {name!r} has a key of its own here; use slurm.{name.replace('-', '_')}"
        for name in job.sbatch
        if name.replace("-", "_") in SlurmJob.__dataclass_fields__
    ]
    problems += [
        f"slurm.sbatch: {name!r} is set by the launcher; leave it out"
        for name in job.sbatch
        if name.replace("_", "-") in _TAKEN
    ]
    try:
        if job.minutes < 1:
            problems.append(f"slurm.time: {job.time} must be at least a minute")
        elif job.signal_before_s >= 60 * job.minutes:
            problems.append(
                f"slurm.signal_before_s: {job.signal_before_s} s before its end a job of {job.time} has not begun"
            )
    except ValueError:
        problems.append(f"slurm.time: {job.time!r} is not HH:MM:SS, D-HH:MM:SS or a number of minutes")
    if job.gpus_per_node and job.processes_per_node > job.gpus_per_node:
        problems.append(
            f"slurm.tasks_per_node: {job.processes_per_node} processes on {job.gpus_per_node} GPUs; start one a GPU"
        )
    asked = _gpus_of_gres(job.gres)
    if asked is not None and asked != job.gpus_per_node:
        problems.append(
            f"slurm.gres: {job.gres} asks for {asked} GPUs a node, and slurm.gpus_per_node is {job.gpus_per_node}"
        )
    return problems


def _gpus_of_gres(gres: str | None) -> int | None:
    """4 of gpu:a100:4, 1 of gpu; None where it names no GPUs."""
    counts = [
        int(found[1] or 1)
        for part in (gres or "").split(",")
        if (found := _GPUS_OF_GRES.fullmatch(part.removeprefix("gres/").removeprefix("gres:"))) is not None
    ]
    return sum(counts) if counts else None
