"""`pgm-scale export`."""

from __future__ import annotations

import argparse
import re

from pgm_scale.cli.arguments import add_weights_argument, positive

_SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="a run's model as a folder for pgm-scale, transformers and people",
        description="Write a checkpoint of a run, whatever layout trained it, as a folder: weights, config.json, "
        "tokenizer, sampler settings, model card, and the models' code for transformers' trust_remote_code. Ends "
        "with the largest logit difference between the run's model and the one loaded back.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new or empty folder")
    parser.add_argument(
        "--step", type=positive, metavar="N", help="checkpoint (default: the newest good one)"
    )
    add_weights_argument(parser)
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="type that weights are stored in (default fp32)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size_bytes,
        default="5GB",
        metavar="SIZE",
        help="larger models are cut into files of at most this many bytes, as 500MB (default 5GB)",
    )
    parser.add_argument(
        "--metrics", metavar="FILE.json", help="result of `pgm-scale eval --json`, for the model card"
    )
    parser.set_defaults(run=_export)


def size_bytes(text: str) -> int:
    """Bytes of `5GB`, `500MB` or a plain number."""
    match = re.fullmatch(r"(\d{1,15})([KMGT]?B?)", text.strip().upper())
    if match is None or match.group(2) not in _SIZE_UNITS or int(match.group(1)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(match.group(1)) * _SIZE_UNITS[match.group(2)]


def _export(options: argparse.Namespace) -> None:
    from pgm_scale.export.run import ExportRequest, export_run

    request = ExportRequest(
        options.out, options.step, options.weights, options.dtype, options.max_shard_size, options.metrics
    )
    export_run(options.run_folder, request)
