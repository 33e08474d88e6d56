"""`pgm-scale train` and `distill`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pgm_scale.cli.arguments import add_config_arguments

if TYPE_CHECKING:
    from pgm_scale.training.signals import StopFlag


def add_commands(commands: argparse._SubParsersAction) -> None:
    _add_train(commands)
    _add_distill(commands)


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, or go on training it",
        description="Train the run of a configuration, or go on from its newest good checkpoint. The same "
        "command works alone, under torchrun (torchrun --nproc-per-node 8 -m pgm_scale.cli train ...) and "
        "under a bare srun with one task per GPU.",
    )
    add_config_arguments(parser)
    _add_strict(parser)
    parser.set_defaults(run=_train)


def _add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse to go on when the newest checkpoint is bad, instead of falling back to an older one "
        "(checkpoint.strict)",
    )


def _train(options: argparse.Namespace) -> None:
    _run(options)


def _add_distill(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "distill",
        help="distil a trained model into one that samples in fewer steps (SDTT)",
        description="Train, or go on training, the student of a configuration with objective.kind sdtt, round "
        "after round. Its model is that of objective.teacher, a run or an exported folder, and need not be given. "
        "The same command works under torchrun and srun, as `train` does.",
    )
    add_config_arguments(parser)
    _add_strict(parser)
    parser.set_defaults(run=_distill)


def _distill(options: argparse.Namespace) -> None:
    _run(options, distils=True)


def _run(options: argparse.Namespace, distils: bool = False) -> None:
    from pgm_scale.cli.streams import forgiving
    from pgm_scale.training.signals import StopFlag

    with StopFlag() as stop, forgiving("stdout"):  # nothing that libraries print is a result
        try:
            _run_until(stop, options, distils)
        except Exception:
            if stop.was_interrupted:  # in the middle of an import, which broke what came later
                raise KeyboardInterrupt from None
            raise


def _run_until(stop: StopFlag, options: argparse.Namespace, distils: bool) -> None:
    from functools import partial

    from pgm_scale.host_memory import keep_freed_memory

    keep_freed_memory()
    from pgm_scale import config as configuration
    from pgm_scale.errors import UserError
    from pgm_scale.parallel.launch import find_launch
    from pgm_scale.parallel.layout import layout_problems
    from pgm_scale.training.teacher_model import fill_in_model

    launch = find_launch()
    check = partial(layout_problems, world_size=launch.world_size)
    overrides = [*options.overrides, *(["checkpoint.strict=true"] if options.strict else [])]
    config = configuration.load(options.config, overrides, check, fill_in_model)
    if distils and config.objective.kind != "sdtt":
        raise UserError(
            "distill needs a configuration with objective.kind sdtt; use `pgm-scale train` for others"
        )
    from pgm_scale.training.loop import train

    train(config, launch, stop)
