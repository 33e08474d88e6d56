"""The arguments that every kind of preparation has."""

from __future__ import annotations

import argparse
from pathlib import Path

NOTES = """\
The output folder gets a split folder `train` and a split folder `validation`, each with shards, tokenizer.json
and dataset.json (hashes, counts, vocabulary, source). A preparation that was killed goes on with the same
command and ends with the same bytes; a finished one is left as it is. While it works, the folder `.prepare` in
the output takes about as much space again as the result. The number of workers changes no byte."""


def add_output(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    short: str,
    notes: str,
    rows_per_shard: int = 8192,
) -> argparse.ArgumentParser:
    """A subcommand that says where its output goes and what it is like."""
    kind = kinds.add_parser(
        name, help=short, description=notes, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="where the split folders go"
    )
    kind.add_argument(
        "--format",
        choices=["mds", "tar"],
        default="mds",
        help="shards of mosaicml-streaming or WebDataset (default: %(default)s)",
    )
    kind.add_argument(
        "--rows-per-shard",
        type=int,
        default=rows_per_shard,
        metavar="N",
        help="rows of a full shard (default: %(default)s)",
    )
    kind.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes; 0 is one for each core (default: 0)"
    )
    kind.add_argument("--quiet", action="store_true", help="show no progress bars")
    return kind


def add_validation_share(kind: argparse.ArgumentParser, share: float) -> None:
    kind.add_argument(
        "--validation-share",
        type=float,
        default=share,
        metavar="SHARE",
        help="share of the documents or images that is for validation (default: %(default)s)",
    )
