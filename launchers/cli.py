"""`pgm-scale launch ...`: its options, and what becomes of them."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.command import LAUNCHABLE, TRAININGS, Stage, build_stage, with_exclusions
from pgm_scale.cli.arguments import positive
from pgm_scale.errors import UserError

_JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
# Options of the command line that are keys of the `slurm` section.
_SETTINGS = ("nodes", "gpus_per_node", "tasks_per_node", "time", "partition", "account", "qos")


class CommandFailedError(UserError):
    """A job that ran on this machine has failed; it has said why itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build_parser() -> argparse.ArgumentParser:
    """Of one link of a chain; what it does not know are the words of the command itself."""
    from launchers.status_cli import add_status_commands

    parser = argparse.ArgumentParser(prog="pgm-scale launch", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for command in LAUNCHABLE:
        add_launch_arguments(
            actions.add_parser(
                command,
                allow_abbrev=False,
                usage=f"pgm-scale launch {command} ... --cluster FILE.yaml [options] [--then ACTION ...]",
                description=f"The arguments of `pgm-scale {'doctor' if command == 'preflight' else command}`, and:",
            )
        )
    add_status_commands(actions)
    return parser


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", metavar="FILE.yaml", help="cluster file with a `slurm` section (configs/clusters/)"
    )
    parser.add_argument("--nodes", type=positive, help="over slurm.nodes, as the next ones")
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--tasks-per-node", type=positive, help="processes of a node (default: one a GPU)")
    parser.add_argument("--time", help="HH:MM:SS, D-HH:MM:SS or minutes")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}")
    parser.add_argument(
        "--exclude",
        metavar="NODES|FILE.json",
        help="nodes to avoid, or the report of a preflight that names them",
    )
    parser.add_argument("--name", help="of the job (default: the run's)")
    parser.add_argument("--after", metavar="JOBID", help="start when this job has ended well")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch texts, submit nothing")
    parser.add_argument(
        "--local", action="store_true", help="run the same jobs here, one process a task, and wait"
    )


def launch(words: Sequence[str]) -> None:
    """Run `pgm-scale launch` with these words.

    Raises:
        UserError: nothing was submitted, or not all of a chain: the message says so.
    """
    parser = build_parser()
    links = _split_chain(words)
    options, rest = parser.parse_known_args(links[0])
    if hasattr(options, "run"):  # status, logs, cancel
        options.run(parser.parse_args(words))
        return
    _check_first(options)
    stages = [_stage(options, rest, options.cluster, follows=options.after is not None)]
    for link in links[1:]:
        following, rest = parser.parse_known_args(link)
        _check_following(following)
        stages.append(_stage(following, rest, following.cluster or options.cluster, follows=True))
    if options.dry_run:
        _print_texts(stages, options.after)
    elif options.local:
        _run_here(stages)
    else:
        _submit(stages, options.after)


def _split_chain(words: Sequence[str]) -> list[list[str]]:
    links: list[list[str]] = [[]]
    for word in words:
        if word == "--then":
            links.append([])
        else:
            links[-1].append(word)
    if not all(links):
        raise UserError("--then: an action must follow, for example --then export runs/owt --out exported")
    return links


def _check_first(options: argparse.Namespace) -> None:
    if options.after is not None and not _JOB_ID.fullmatch(options.after):
        raise UserError(
            f"--after {options.after}: give the id of one job, for example 12, or 12_3 of an array"
        )
    if options.after is not None and options.local:
        raise UserError(
            "--after: nothing here waits for a job of Slurm's; leave it out, or leave out --local"
        )


def _check_following(options: argparse.Namespace) -> None:
    if hasattr(options, "run"):
        raise UserError(
            f"--then {options.action}: only jobs can follow; run `pgm-scale launch {options.action}` alone"
        )
    if options.after or options.dry_run or options.local:
        raise UserError(
            f"--then {options.action}: give --after, --dry-run and --local before the first --then"
        )


def _stage(options: argparse.Namespace, rest: list[str], cluster: str | None, follows: bool) -> Stage:
    if cluster is None:
        raise UserError(
            f"launch {options.action}: give the cluster's file, for example --cluster configs/clusters/h100-8x.yaml"
        )
    settings: dict[str, Any] = {
        name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None
    }
    stage = build_stage(options.action, rest, cluster, settings, options.name, follows)
    nodes = _excluded(options.exclude) if options.exclude else ""
    return with_exclusions(stage, nodes) if nodes else stage


def _excluded(given: str) -> str:
    """Node names, of a list or of the report of a preflight."""
    if not given.endswith(".json"):
        return given
    try:
        report = json.loads(Path(given).read_text())
    except OSError as error:
        raise UserError(f"--exclude {given}: cannot be read ({error.strerror})") from None
    except ValueError:
        report = None
    nodes = report.get("bad_nodes") if isinstance(report, dict) else None
    if isinstance(report, dict) and report.get("verdict") == "unfinished":
        raise UserError(
            f"--exclude {given}: that preflight has not ended well and checked nothing; run it again"
        )
    if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
        raise UserError(f"--exclude {given}: names no bad_nodes; give the JSON of `doctor --cluster --json`")
    return ",".join(nodes)


def _print_texts(stages: list[Stage], after: str | None) -> None:
    from launchers.submission import dependency_on, sbatch_text

    dependency = f"afterok:{after}" if after else None
    for stage in stages:
        text = sbatch_text(stage, dependency)
        for index, job in enumerate(stage.jobs):
            place = f" (array index {index})" if len(stage.jobs) > 1 else ""
            print(f"# {stage.name}{place}: pgm-scale {shlex.join(job.words)}")
        print(text)
        dependency = dependency_on(stage, [f"<id of {stage.name}>"])


def _run_here(stages: list[Stage]) -> None:
    from launchers.local import run_here

    for stage in stages:
        code = run_here(stage, lambda line: print(line, file=sys.stderr))
        if code:
            raise CommandFailedError(
                f"{stage.name} ended here with exit code {code}; see {stage.folder}", code
            )


def _submit(stages: list[Stage], after: str | None) -> None:
    from launchers.submission import dependency_on, submit, tell_preflight

    if after is None:
        for stage in stages:
            _refuse_second_job(stage)
    else:
        _check_known(after)
    waits_for = [f"afterok:{after}"] if after else []
    done: list[tuple[Stage, list[str]]] = []
    for stage in stages:
        dependency = waits_for[-1] if waits_for else None
        try:
            ids = submit(stage, dependency)
        except UserError as error:
            before = ", ".join(f"{earlier.name} as {earlier_ids[0]}" for earlier, earlier_ids in done)
            raise UserError(f"{error}\n  submitted before it: {before}" if done else str(error)) from None
        if done and done[-1][0].is_preflight:
            tell_preflight(done[-1][0], done[-1][1][0], stage, ids)
        _record(stage, ids, dependency)
        done.append((stage, ids))
        waits_for.append(dependency_on(stage, ids))


def _check_known(job_id: str) -> None:
    """Of a job that it does not know Slurm says that it has ended well.

    Raises:
        UserError: it does not know it.
    """
    from launchers.slurm import show_jobs

    if not show_jobs([job_id]):
        raise UserError(
            f"--after {job_id}: Slurm knows no such job (any more): leave it out if it has ended well"
        )


def _refuse_second_job(stage: Stage) -> None:
    """A second training in a run's folder would wait for its turn and then be refused by the run's lock.

    Raises:
        UserError: a job of the stage's folder waits or runs.
    """
    from launchers.records import read_launches
    from launchers.slurm import show_jobs
    from launchers.status import view_of

    if stage.command not in TRAININGS or not stage.folder.exists():
        return
    records = [launched.record for launched in read_launches(stage.folder)]
    views = show_jobs(record.job_id for record in records)
    found = [view_of(record, views) for record in records]
    going_on = [view.id for view in found if view is not None and not view.has_ended]
    if going_on:
        raise UserError(
            f"{stage.name}: job {', '.join(going_on)} of {stage.folder.parent} waits or runs already; cancel it "
            f"(pgm-scale launch cancel {going_on[0]}), or start this one behind it with --after {going_on[0]}"
        )


def _record(stage: Stage, ids: list[str], dependency: str | None) -> None:
    """Tell what was submitted, and write it down."""
    from launchers.records import LaunchRecord, append_launches

    slurm, array = stage.slurm, ids[0].partition("_")[0]
    waits = f", {dependency}" if dependency else ""
    size = f"{slurm.nodes} nodes x {slurm.processes_per_node} processes, {slurm.time}"
    for job_id, job in zip(ids, stage.jobs, strict=True):
        print(f"{stage.command}: job {job_id} ({stage.name}): {size}{waits}")
        if job.run_folder:
            print(f"  run   {job.run_folder}")
        print(f"  logs  {stage.folder}/{job_id}_*_log.out, .err")
    append_launches(
        stage.folder,
        [
            LaunchRecord(
                job_id,
                stage.name,
                job.words,
                job.run_folder,
                f"{stage.folder}/{job_id}_*_log.*",
                f"{stage.folder}/{array}_submission.sh",
                str(Path(stage.cluster).absolute()),
                tuple((dependency or "").split(":")[1:]),
            )
            for job_id, job in zip(ids, stage.jobs, strict=True)
        ],
    )
