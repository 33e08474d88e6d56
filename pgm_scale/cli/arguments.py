"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?" if optional else None, help="run configuration"
    )
    parser.add_argument(
        "overrides",
        metavar="SECTION.KEY=VALUE",
        nargs="*",
        help="set a key over the file, for example training.steps=1000 model.size=pgm-8-8-768",
    )


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", choices=("ema", "weight"), default="ema", help="averaged or raw weights (default ema)"
    )


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
