"""`pgm-scale config` and `doctor`: look before you train."""

from __future__ import annotations

import argparse
import sys

from pgm_scale.cli.arguments import add_config_arguments


def add_commands(commands: argparse._SubParsersAction) -> None:
    _add_config(commands)
    _add_doctor(commands)


def _add_config(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "config",
        help="print the resolved configuration",
        description="Read a configuration, apply overrides, check everything, print it whole as YAML.",
    )
    add_config_arguments(parser)
    parser.set_defaults(run=_print_config)


def _print_config(options: argparse.Namespace) -> None:
    from pathlib import Path

    from pgm_scale import config as configuration
    from pgm_scale.data.manifest import MANIFEST_NAME
    from pgm_scale.data.storage import is_remote
    from pgm_scale.training.teacher_model import fill_in_model

    config = configuration.load(options.config, options.overrides, complete=fill_in_model)
    print(configuration.to_yaml(config), end="")
    for line in configuration.cautions(config):
        print(f"warning: {line}", file=sys.stderr)
    for key, split in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        if not is_remote(split) and not (Path(split) / MANIFEST_NAME).exists():
            print(f"warning: {key}: no prepared split in {split}; `train` will refuse it", file=sys.stderr)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine, and a configuration's data and folders; with --cluster all nodes",
        description="Versions, devices, NVIDIA Apex or its fallback, and, under a launcher, the rank map. With a "
        "configuration: hashes of all shards and room in the run folder. With --cluster, on all tasks of srun or "
        "torchrun: every node, and whether clocks, matrix products, all-reduces and file systems of all agree; bad "
        "nodes and stragglers are named. Exit code 2 if something is wrong.",
    )
    add_config_arguments(parser, optional=True)
    cluster = parser.add_argument_group("of all nodes")
    cluster.add_argument(
        "--cluster", action="store_true", help="look at all nodes, and from each at the others"
    )
    cluster.add_argument("--json", metavar="FILE", help="write what was found; its bad_nodes can be excluded")
    cluster.add_argument(
        "--hashes", action="store_true", help="read all data on every node and compare its SHA-256"
    )
    cluster.add_argument(
        "--slow-fraction",
        type=_fraction,
        metavar="F",
        help="a rank is a straggler below F of the median rank's rate (default 0.85 on GPUs, 0.5 on CPUs)",
    )
    parser.set_defaults(run=_doctor)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return value


def _doctor(options: argparse.Namespace) -> None:
    from pgm_scale.errors import UserError

    if options.cluster:
        from pgm_scale.preflight.run import Options, examine_cluster

        chosen = Options(options.json, options.hashes, options.slow_fraction)
        examine_cluster(options.config, options.overrides, chosen)
        return
    if options.json or options.hashes or options.slow_fraction:
        raise UserError("--json, --hashes and --slow-fraction are of doctor --cluster; add --cluster")
    from pgm_scale.doctor import examine

    examine(options.config, options.overrides)
