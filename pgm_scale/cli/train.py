"""`pgm-scale train`."""

from __future__ import annotations

import argparse

from pgm_scale.cli.arguments import add_config_arguments


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, or go on training it",
        description="Train the run of a configuration, or go on from its newest good checkpoint. The same "
        "command works alone, under torchrun (torchrun --nproc-per-node 8 -m pgm_scale.cli train ...) and "
        "under a bare srun with one task per GPU.",
    )
    add_config_arguments(parser)
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from functools import partial

    from pgm_scale.host_memory import keep_freed_memory

    keep_freed_memory()
    from pgm_scale import config as configuration
    from pgm_scale.parallel.launch import find_launch
    from pgm_scale.parallel.layout import layout_problems

    launch = find_launch()
    check = partial(layout_problems, world_size=launch.world_size)
    config = configuration.load(options.config, options.overrides, check)
    from pgm_scale.training.loop import train

    train(config, launch)
