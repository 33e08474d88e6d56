"""Which sample is read when, and by whom: pure functions, so the whole state of reading is one counter.

Sample numbers count from the start of the run and on across epochs. In every epoch the shards are permuted and
cut into blocks of `shuffle_block_shards`, and the rows of each block are permuted. A reader therefore works
within few shards at a time, and no layout of ranks can change what sample n is. The price: the rows of a step
are spread over the whole block, so every data-parallel rank reads every shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_ORDER_KEY = 0x6F72646572  # keeps these Philox streams apart from those of the objectives' draws
_SHARDS, _ROWS = 0, 1


def step_sample_numbers(
    step: int, micro_step: int, data_rank: int, data_ranks: int, global_batch: int, micro_batch: int
) -> np.ndarray:
    """Global sample numbers, int64 [micro_batch], of one micro-batch of one data-parallel rank.

    Step s covers samples [s * global_batch, (s + 1) * global_batch); its micro-batch m on rank r the
    `micro_batch` samples from s * global_batch + (m * data_ranks + r) * micro_batch on.
    """
    start = step * global_batch + (micro_step * data_ranks + data_rank) * micro_batch
    return np.arange(start, start + micro_batch, dtype=np.int64)


def data_step(step: int, left_out: Sequence[tuple[int, int]]) -> int:
    """The step whose data `step` is trained on: the `step`-th, from 0, of those in none of the ranges."""
    for first, last in left_out:
        if step >= first:
            step += last - first + 1
    return step


@dataclass(frozen=True)
class BatchPlan:
    """One rank's share of the global batch, in sequences.

    Attributes:
        left_out: ranges of steps whose data are not trained on, from the first to the last, ascending and disjoint:
            a step takes the data of the one after them.
    """

    global_batch_sequences: int
    micro_batch_sequences: int
    data_rank: int = 0
    data_ranks: int = 1
    left_out: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_ranks
        assert self.global_batch_sequences % (self.micro_batch_sequences * self.data_ranks) == 0

    @property
    def micro_steps(self) -> int:
        """Micro-batches that each rank runs in a step (gradient accumulation)."""
        return self.global_batch_sequences // (self.micro_batch_sequences * self.data_ranks)

    def sample_numbers(self, step: int, micro_step: int) -> np.ndarray:
        """int64 [micro_batch_sequences]; see `step_sample_numbers`."""
        assert 0 <= micro_step < self.micro_steps
        return step_sample_numbers(
            data_step(step, self.left_out),
            micro_step,
            self.data_rank,
            self.data_ranks,
            self.global_batch_sequences,
            self.micro_batch_sequences,
        )


class GlobalOrder:
    """Sample number -> (shard, row), a permutation of all rows in every epoch.

    Args:
        rows_per_shard: rows of each shard, in the manifest's order.
        seed: of the run; the order of epoch e depends on nothing but it, e and the shards.
        shuffle_block_shards: shards whose rows are mixed, which is also what a rank keeps open.
        shuffle: False gives the stored order in every epoch, for validation.
    """

    def __init__(
        self, rows_per_shard: Sequence[int], seed: int, shuffle_block_shards: int, shuffle: bool = True
    ) -> None:
        assert shuffle_block_shards >= 1
        self.rows_per_shard_S = np.asarray(rows_per_shard, np.int64)
        self.rows = int(self.rows_per_shard_S.sum())
        self.shuffle = shuffle
        self.open_shards = min(shuffle_block_shards, len(self.rows_per_shard_S)) if shuffle else 1
        self._seed = seed % 2**64
        # Two entries are in use at a time, at the seam of two blocks or epochs; a block's takes 12 bytes a row.
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)
        self._block = lru_cache(maxsize=2)(self._compute_block)

    def locate(self, sample_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard index and row within it, int64 of the shape of `sample_numbers` (any, of numbers >= 0)."""
        sample_numbers = np.asarray(sample_numbers, np.int64)
        epochs, places = np.divmod(sample_numbers, self.rows)
        shards, rows = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            starts = self._epoch(epoch)[1]
            blocks = np.where(epochs == epoch, np.searchsorted(starts, places, side="right") - 1, -1)
            for block in np.unique(blocks[blocks >= 0]).tolist():
                inside = blocks == block
                block_shards, block_rows = self._block(epoch, block)
                shards[inside] = block_shards[places[inside] - starts[block]]
                rows[inside] = block_rows[places[inside] - starts[block]]
        return shards, rows

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the place in the epoch at which each block starts."""
        count = len(self.rows_per_shard_S)
        shards = self._permutation(count, epoch, 0, _SHARDS) if self.shuffle else np.arange(count)
        ends = np.cumsum(self.rows_per_shard_S[shards])
        return shards, np.concatenate([[0], ends])[: -1 : self.open_shards]

    def _compute_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of every place in a block."""
        shards = self._epoch(epoch)[0][block * self.open_shards : (block + 1) * self.open_shards]
        counts = self.rows_per_shard_S[shards]
        all_shards = np.repeat(shards, counts).astype(np.int32)
        all_rows = np.concatenate([np.arange(count) for count in counts])
        if not self.shuffle:
            return all_shards, all_rows
        mixed = self._permutation(len(all_rows), epoch, block, _ROWS)
        return all_shards[mixed], all_rows[mixed]

    def _permutation(self, count: int, epoch: int, block: int, purpose: int) -> np.ndarray:
        """By sorting the raw words of a counter-based generator, which no numpy release changes."""
        key = np.array(
            [self._seed, _ORDER_KEY], np.uint64
        )  # of a list, a seed from 2**63 on would be rounded
        generator = np.random.Philox(key=key, counter=[0, epoch, block, purpose])
        return np.argsort(generator.random_raw(count), kind="stable")
