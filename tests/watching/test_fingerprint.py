"""The fingerprint of the data: of what it depends on, and equal at every layout, micro-batch size and resume."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgm_scale.config import RunConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.loader import TokenLoader
from pgm_scale.data.order import GlobalOrder
from pgm_scale.data.storage import SplitStorage
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.loop import train_on_mesh
from pgm_scale.watching.fingerprint import MODULUS, fingerprint
from tests.distributed import run_ranks
from tests.tiny_data import tiny_config, write_tiny_data


def batch(numbers: list[int], seed: int = 0, labels: bool = False) -> TokenBatch:
    """Tokens and labels that are functions of the seed and the sample's number."""
    rows = [np.random.default_rng([seed, number]).integers(0, 60_000, 9) for number in numbers]
    tokens_BL = np.stack(rows)
    classes_B = tokens_BL[:, 0].copy() if labels else None
    return TokenBatch(tokens_BL[:, 1:], np.ones((len(numbers), 8), bool), np.array(numbers), classes_B)


@pytest.mark.parametrize("labels", [False, True])
def test_it_is_a_sum_over_sequences(labels: bool) -> None:
    numbers = [7, 3, 2**40, 12]
    whole = fingerprint(batch(numbers, labels=labels))
    assert fingerprint(batch(numbers[::-1], labels=labels)) == whole
    assert sum(fingerprint(batch([number], labels=labels)) for number in numbers) % MODULUS == whole


def test_every_token_number_and_class_counts() -> None:
    given = batch([5, 6], labels=True)
    assert given.labels_B is not None
    seen = {fingerprint(given), fingerprint(batch([5, 6]))}
    assert len(seen) == 2, "a class counts"
    for array in (given.tokens_BL, given.sample_numbers_B, given.labels_B):
        for place in np.ndindex(array.shape):
            array[place] += 1
            seen.add(fingerprint(given))
            array[place] -= 1
    assert len(seen) == 2 + given.tokens_BL.size + 2 + 2


def _train_all(mesh: Mesh, configs: list[RunConfig]) -> None:
    for config in configs:
        train_on_mesh(config, mesh, SplitStorage(config.data.train), SplitStorage(config.data.validation))


def _seen(run: Path) -> list[tuple[int, int, list[int]]]:
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return [(record["step"], record["data_fingerprint"], record["sample_numbers"]) for record in records]


def _expected(config: RunConfig, first_step: int, last_step: int) -> int:
    """From the data itself, sequence by sequence."""
    split = SplitStorage(config.data.train)
    order = GlobalOrder(split.manifest.rows_per_shard, config.training.seed, config.data.shuffle_block_shards)
    size = config.training.global_batch_sequences
    read = TokenLoader(split, order).read(np.arange(first_step * size, last_step * size))
    total = 0
    for number, tokens_L in zip(read.sample_numbers_B.tolist(), read.tokens_BL.tolist(), strict=True):
        words = b"".join(value.to_bytes(8, "little") for value in [number, *tokens_L])
        total += zlib.crc32(words)
    return total % 2**40


def test_records_are_equal_at_every_layout_and_after_a_resume(tmp_path: Path) -> None:
    """17 steps of 8 of 100 rows: into the second epoch; two steps a record."""
    data = write_tiny_data(tmp_path / "data")

    def config(run: str, micro: int, steps: int = 17, **changes: Any) -> RunConfig:
        training = {"steps": steps, "micro_batch_sequences": micro, "log_interval_steps": 2}
        return tiny_config(
            data,
            tmp_path / run,
            training=training,
            checkpoint={"interval_steps": 50},
            validation={"interval_steps": 50, "samples": 0},
            **changes,
        )

    first = config("one", 8)
    run_ranks(1, _train_all, [first, config("small", 1), config("moved", 4, steps=8)])
    run_ranks(
        2, _train_all, [config("two", 2), config("three", 4, parallel={"zero_stage": 3}), config("moved", 2)]
    )
    run_ranks(2, _train_all, [config("split", 8, parallel={"tensor": 2})])
    ends = [*range(2, 17, 2), 17]
    expected = [
        (end, _expected(first, start, end), [8 * end - 8, 8 * end - 1])
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    for run in ("one", "small", "two", "three", "split", "moved"):
        assert _seen(tmp_path / run) == expected, run
