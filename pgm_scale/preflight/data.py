"""The training and validation data as this node sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pgm_scale.config import RunConfig
from pgm_scale.data.storage import open_splits
from pgm_scale.errors import UserError
from pgm_scale.preflight.rows import Row
from pgm_scale.preflight.setup import setup_problems

_TO_DO = "if other nodes see it, mount it or copy it to this one"


def data_rows(config: RunConfig, judges_setup: bool) -> Iterator[Row]:
    """Manifests, shards of the right sizes, and a cache folder for remote ones, whose names only are looked up.

    Args:
        judges_setup: also whether data, model and run folder fit together, which is the same on all nodes.
    """
    problems: list[str] = []
    data = config.data
    splits = open_splits(data.train, data.validation, data.cache_folder, problems)
    for problem in problems:
        yield Row("data", problem, "bad", _TO_DO)
    if not problems:
        rows = sum(split.manifest.rows for split in splits)
        yield Row("data", f"{sum(len(s.manifest.shards) for s in splits)} shards, {rows} rows")
    if judges_setup:
        for problem in setup_problems(config, splits):
            yield Row("configuration", problem, "bad")


def hash_rows(config: RunConfig, turn: int, turns: int, progress: Callable[[str], None]) -> Iterator[Row]:
    """Read every `turns`-th file of the data and compare its SHA-256: the ranks of a node share the work.

    Remote shards are fetched into the cache. Splits that cannot be opened are `data_rows`' to tell.
    """
    problems: list[str] = []
    splits = open_splits(config.data.train, config.data.validation, config.data.cache_folder, problems)
    checks: list[Callable[[], Path]] = []
    for split in splits:
        checks += [
            split.tokenizer_path,
            *(partial(split.shard_path, shard) for shard in split.manifest.shards),
        ]
    mine, bad = checks[turn::turns], 0
    for check in mine:
        progress("preflight: hashes of the data")
        try:
            check()
        except UserError as error:  # go on with the others
            bad += 1
            yield Row("hashes", str(error), "bad", _TO_DO)
    if not bad:
        yield Row("hashes", f"{len(mine)} files as they should be")
