"""`pgm-scale launch`: the other commands as jobs on a Slurm cluster."""

from __future__ import annotations

import argparse

_DESCRIPTION = """\
Run a command as a job of Slurm, with the `slurm` section of a cluster file; requeued by itself, a training goes on
exactly where its newest checkpoint is.

  pgm-scale launch train configs/owt.yaml --cluster configs/clusters/NAME.yaml --nodes 4
  pgm-scale launch train configs/owt.yaml optimizer.learning_rate=1e-4,3e-4 --cluster ...      a job array
  pgm-scale launch prepare openwebtext --output data/owt --cluster ... --then train configs/owt.yaml \\
      --then distill configs/owt_sdtt.yaml --then export runs/owt-sdtt --out exported          a chain
  pgm-scale launch status|logs|cancel RUN

ACTION is train, distill, prepare, eval, eval-images, sample, convert, export, report or preflight, each with the
arguments of its own command (preflight: of `doctor`), or status, logs or cancel. `pgm-scale launch ACTION --help`
has the options."""


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "launch",
        help="run commands as jobs on a Slurm cluster; see and cancel them",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", metavar="ACTION", help="what to run, or status, logs, cancel")
    parser.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help="its arguments and options")
    parser.set_defaults(run=_launch)


def _launch(options: argparse.Namespace) -> None:
    from launchers.cli import launch

    launch([options.action, *options.words])
