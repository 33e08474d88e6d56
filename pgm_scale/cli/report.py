"""`pgm-scale report`."""

from __future__ import annotations

import argparse


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="curves of runs, and quality against speed, as one HTML page",
        description="Draw losses, perplexity, gradient norm, learning rate and speed of one or several runs, also "
        "of runs that are still going, and quality against speed of evaluations. Writes report.html, which holds "
        "everything, the pictures as PNG, and report.json with every number in them.",
    )
    parser.add_argument("run_folders", metavar="RUN", nargs="*", help="folders of runs")
    parser.add_argument(
        "--eval",
        metavar="FILE.json",
        nargs="+",
        action="extend",
        default=[],
        help="results of `eval --json` with generative perplexity, or of `eval-images --out`; a line a model and "
        "sampler, over its sampling steps",
    )
    parser.add_argument("--out", metavar="FOLDER", default="report", help="(default %(default)s)")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from pgm_scale.reporting.command import report

    print(report(options.run_folders, options.eval, options.out))
