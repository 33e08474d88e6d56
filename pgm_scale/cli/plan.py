"""`pgm-scale plan`."""

from __future__ import annotations

import argparse

from pgm_scale.cli.arguments import add_config_arguments, positive


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="find the parallel layout for a cluster, without GPUs",
        description="Predict memory, traffic and speed of every layout of a configuration's model and global batch "
        "on a number of GPUs, and print those that fit, fastest first, with the YAML to paste. Each printed one is "
        "built, on tensors without memory. Exit code 2 if nothing fits.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--cluster",
        metavar="FILE.yaml",
        default="configs/clusters/h100-8x.yaml",
        help="hardware and assumptions (default %(default)s)",
    )
    parser.add_argument("--gpus", type=positive, help="how many (default: one node)")
    parser.add_argument("--length", type=positive, help="tokens of a sequence (default: the data's)")
    parser.add_argument("--vocab-size", type=positive, help="tokens of the vocabulary (default: the data's)")
    parser.add_argument("--top", type=positive, default=5, help="print so many (default 5)")
    parser.add_argument("--json", metavar="FILE", help="also write them as JSON")
    parser.add_argument(
        "--measure", action="store_true", help="time the model's units on this machine's GPU first"
    )
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from pgm_scale.planning.run import PlanRequest, plan

    plan(
        PlanRequest(
            config_path=options.config,
            overrides=options.overrides,
            cluster_path=options.cluster,
            gpus=options.gpus,
            length=options.length,
            vocab_size=options.vocab_size,
            top=options.top,
            json_path=options.json,
            measures=options.measure,
        )
    )
