"""The commands that can be jobs: how many processes they are, what they are called, where their files go."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launchers.after import PREFLIGHT_REPORT
from launchers.cluster import SlurmJob, load_slurm_job
from launchers.job import Job
from launchers.sweep import expand
from pgm_scale import config as configuration
from pgm_scale.config import RunConfig
from pgm_scale.data.manifest import MANIFEST_NAME
from pgm_scale.data.storage import is_remote
from pgm_scale.errors import UserError

TRAININGS = ("train", "distill")
# One process each; what they take over of the cluster's section, if its `jobs` say nothing else.
_ONE_PROCESS = {"nodes": 1, "tasks_per_node": 1, "gres": None, "exclusive": False, "launcher": "srun"}
SINGLE: dict[str, dict[str, Any]] = {
    "prepare": _ONE_PROCESS | {"gpus_per_node": 0},
    "convert": _ONE_PROCESS | {"gpus_per_node": 0},
    "export": _ONE_PROCESS | {"gpus_per_node": 0},
    "eval": _ONE_PROCESS,
    "eval-images": _ONE_PROCESS,
    "sample": _ONE_PROCESS,
    "report": _ONE_PROCESS | {"gpus_per_node": 0},
}
LAUNCHABLE = (*TRAININGS, *SINGLE, "preflight")
_MAY_BE_SEVERAL = ("eval-images",)  # of the single ones: its processes share the work if there are more


@dataclass(frozen=True)
class Stage:
    """One link of a chain: a job, or the array of a sweep.

    Attributes:
        folder: submitit's, for the pickles, the sbatch text and the logs.
        cluster: the cluster file.
    """

    command: str
    name: str
    folder: Path
    cluster: str
    slurm: SlurmJob
    jobs: tuple[Job, ...]

    @property
    def is_preflight(self) -> bool:
        return self.command == "preflight"


def build_stage(
    command: str,
    arguments: Sequence[str],
    cluster: str,
    settings: Mapping[str, Any],
    name: str | None = None,
    follows: bool = False,
) -> Stage:
    """Check a command as far as that is possible now, and find its place.

    Args:
        settings: of the `slurm` section, from the command line.
        follows: another job comes before it, so its input may not be there yet.

    Raises:
        UserError: everything that the command itself would refuse at once.
    """
    if command not in LAUNCHABLE:
        raise UserError(f"{command!r} cannot be launched; known are {', '.join(LAUNCHABLE)}")
    slurm = load_slurm_job(cluster, command, settings, _single(command, cluster), LAUNCHABLE)
    if command in SINGLE and command not in _MAY_BE_SEVERAL and slurm.processes > 1:
        raise UserError(
            f"launch {command} is one process, and this asks for {slurm.nodes} nodes x {slurm.processes_per_node}: "
            f"leave out --nodes and --tasks-per-node, and these keys in slurm.jobs.{command} of {cluster}"
        )
    if command in TRAININGS:
        return _training_stage(command, arguments, cluster, slurm, name, follows)
    stage_name = name or command
    folder = Path("jobs", _file_name(stage_name)).absolute()
    words = (command, *arguments)
    if command == "preflight":
        words = ("doctor", *arguments, "--cluster", "--json", str(folder / PREFLIGHT_REPORT))
    _parse(words)
    if command == "preflight" and arguments and not arguments[0].startswith("-"):
        overrides = [word for word in arguments[1:] if "=" in word and not word.startswith("-")]
        _training_config(("train", arguments[0], *overrides), slurm, follows)
    return Stage(command, stage_name, folder, cluster, slurm, (_job(words, slurm),))


def _single(command: str, cluster: str) -> dict[str, Any] | None:
    """A single process takes one GPU where the cluster's trainings take several."""
    if command not in SINGLE:
        return None
    defaults = SINGLE[command]
    if "gpus_per_node" in defaults:
        return defaults
    section = configuration.read_yaml(cluster).get("slurm")
    gpus = section.get("gpus_per_node", 0) if isinstance(section, dict) else 0
    return defaults | {"gpus_per_node": int(bool(gpus))}


def _training_stage(
    command: str, arguments: Sequence[str], cluster: str, slurm: SlurmJob, name: str | None, follows: bool
) -> Stage:
    jobs, sweep = [], expand(arguments)
    _parse((command, *sweep[0][0]))
    base = _training_config((command, *sweep[0][0]), slurm, follows)
    for words, suffix in sweep:
        if suffix:
            words = (*words, f"folder={base.folder}-{suffix}", f"name={base.name}-{suffix}")
        _parse((command, *words))
        config = _training_config((command, *words), slurm, follows) if suffix else base
        if isinstance(config, RunConfig) and not follows:
            _check_continues(config)
        jobs.append(_job((command, *words), slurm, str(Path(config.folder).absolute())))
    _refuse_shared_folders(jobs)
    parent = Path(base.folder).absolute()
    folder = parent.with_name(parent.name + "-sweep") if len(jobs) > 1 else parent
    return Stage(command, name or base.name, folder / "jobs", cluster, slurm, tuple(jobs))


def _refuse_shared_folders(jobs: Sequence[Job]) -> None:
    """As of a value that is given twice, or of two whose names are the same."""
    folders = [str(job.run_folder) for job in jobs]
    shared = {folder for folder in folders if folders.count(folder) > 1}
    if shared:
        raise UserError(
            f"two runs of the sweep would train in {min(shared)}: their values are, or are named, the same"
        )


def _job(words: tuple[str, ...], slurm: SlurmJob, run_folder: str | None = None) -> Job:
    return Job(
        words,
        slurm.nodes,
        slurm.processes_per_node,
        slurm.launcher,
        run_folder,
        answers_signals=run_folder is not None,
        launched_from=str(Path.cwd()),
    )


def _check_continues(config: RunConfig) -> None:
    """What the job would refuse after it has waited for its nodes.

    Raises:
        UserError: the run in the folder is another one.
    """
    if not is_remote(config.data.train) and not (Path(config.data.train) / MANIFEST_NAME).exists():
        print(
            f"warning: data.train: no prepared split in {config.data.train} here; without one there the job will "
            "be refused",
            file=sys.stderr,
        )
    elif (Path(config.folder) / "run.json").exists():
        from pgm_scale.data.manifest import DatasetManifest
        from pgm_scale.run_folder import RunFolder

        RunFolder(config.folder).check_continues(config, DatasetManifest.load(config.data.train))


@dataclass(frozen=True)
class _Place:
    """What is known of a distillation whose teacher is still to be trained."""

    folder: str
    name: str


def _training_config(words: tuple[str, ...], slurm: SlurmJob, follows: bool) -> RunConfig | _Place:
    from pgm_scale.parallel.layout import layout_problems
    from pgm_scale.training.teacher_model import fill_in_model

    if len(words) < 2:
        raise UserError(f"launch {words[0]}: give a configuration (CONFIG.yaml)")
    path, *overrides = words[1:]
    check = partial(layout_problems, world_size=slurm.processes)
    try:
        config = configuration.load(path, overrides, check, fill_in_model)
    except UserError as error:
        if not follows or "objective.teacher" not in str(error):
            raise
        # Its model is that of a teacher which an earlier job will make.
        return _Place(*_folder_and_name(path, overrides))
    if words[0] == "distill" and config.objective.kind != "sdtt":
        raise UserError(
            f"{path}: distill needs a configuration with objective.kind sdtt; launch train for others"
        )
    return config


def _folder_and_name(path: str, overrides: Sequence[str]) -> tuple[str, str]:
    tree = configuration.read_yaml(path)
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    return given.get("folder", str(tree.get("folder"))), given.get("name", str(tree.get("name", "run")))


def _parse(words: Sequence[str]) -> None:
    """As the command itself would; argparse says what is wrong and ends the process."""
    from pgm_scale.cli import parse_arguments

    parse_arguments(words)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]+", "_", text)


def with_exclusions(stage: Stage, nodes: str) -> Stage:
    """The stage on other nodes than these, besides those that it leaves out already."""
    exclude = ",".join(filter(None, (stage.slurm.exclude, nodes)))
    return dataclasses.replace(stage, slurm=dataclasses.replace(stage.slurm, exclude=exclude))
