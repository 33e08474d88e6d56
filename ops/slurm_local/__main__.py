"""`python -m ops.slurm_local start|status|stop`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ops.slurm_local.cluster import LocalSlurm, default_folder
from ops.slurm_local.configuration import Settings
from pgm_scale.cli.arguments import positive
from pgm_scale.errors import UserError


def main() -> int:
    options = _parser().parse_args()
    cluster = LocalSlurm(options.folder)
    try:
        options.run(cluster, options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _start(cluster: LocalSlurm, options: argparse.Namespace) -> None:
    cluster.start(
        Settings(
            options.nodes,
            options.cpus_per_node,
            options.grace_s,
            options.signal_at_preemption,
        )
    )
    print(cluster.export_line())


def _status(cluster: LocalSlurm, options: argparse.Namespace) -> None:
    running = cluster.processes()
    if not running:
        raise UserError(f"no Slurm runs in {cluster.folder}")
    print(cluster.export_line())
    print(f"# {len(running)} processes; nodes: {cluster.node_states() or 'the controller does not answer'}")


def _stop(cluster: LocalSlurm, options: argparse.Namespace) -> None:
    stopped = cluster.stop()
    print(f"{'stopped' if stopped else 'nothing runs'}; logs in {cluster.folder}/logs", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser("python -m ops.slurm_local", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    start = commands.add_parser("start", help="start it and print the line that lets a shell use it")
    start.add_argument("--nodes", type=positive, default=defaults.nodes)
    start.add_argument("--cpus-per-node", type=positive, default=defaults.cpus_per_node)
    start.add_argument(
        "--grace-s",
        type=positive,
        default=defaults.grace_s,
        help="seconds that a job of `main` may go on when one of `urgent` preempts it",
    )
    start.add_argument(
        "--signal-at-preemption",
        action="store_true",
        help="preempted jobs get the signal of their --signal option in place of SIGTERM",
    )
    start.set_defaults(run=_start)
    commands.add_parser("status", help="whether it runs, and its nodes").set_defaults(run=_status)
    commands.add_parser("stop", help="end it and its jobs").set_defaults(run=_stop)
    for command in commands.choices.values():
        command.add_argument("--folder", type=Path, default=default_folder(), help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
