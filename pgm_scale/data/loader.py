"""From sample numbers to batches, and the thread that reads ahead of the training step."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

import numpy as np

from pgm_scale.data.batch import ShardRows, TokenBatch
from pgm_scale.data.order import BatchPlan, GlobalOrder
from pgm_scale.data.readers import read_shard
from pgm_scale.data.storage import SplitStorage

T = TypeVar("T")
CLOSE_TIMEOUT_S = 10.0


class TokenLoader:
    """Reads any samples of a global order.

    Keeps the last `order.open_shards` shards decoded, in their stored type: at most that many times the
    size of the largest shard file in memory, and one more while a shard is read.
    """

    def __init__(self, storage: SplitStorage, order: GlobalOrder) -> None:
        self.storage = storage
        self.manifest = storage.manifest
        self.order = order
        self._open: OrderedDict[int, ShardRows] = OrderedDict()

    def read(self, sample_numbers_B: np.ndarray) -> TokenBatch:
        """The rows of these global sample numbers, in their order.

        Raises:
            UserError: a shard is missing or corrupt; the message names it.
        """
        shards_B, rows_B = self.order.locate(sample_numbers_B)
        length_tokens = self.manifest.length_tokens
        tokens_BL = np.empty((len(shards_B), length_tokens), np.int64)
        valid_lengths_B = np.empty(len(shards_B), np.int64)
        labels_B = np.empty(len(shards_B), np.int64) if self.manifest.images is not None else None
        for shard_index in dict.fromkeys(shards_B.tolist()):  # at a seam of blocks: the old block's first
            inside_B = shards_B == shard_index
            tokens_RL, valid_lengths_R, labels_R = self._shard(shard_index)
            tokens_BL[inside_B] = tokens_RL[rows_B[inside_B]]
            valid_lengths_B[inside_B] = valid_lengths_R[rows_B[inside_B]]
            if labels_B is not None and labels_R is not None:
                labels_B[inside_B] = labels_R[rows_B[inside_B]]
        valid_BL = np.arange(length_tokens) < valid_lengths_B[:, None]
        return TokenBatch(tokens_BL, valid_BL, np.asarray(sample_numbers_B, np.int64), labels_B)

    def _shard(self, index: int) -> ShardRows:
        if index not in self._open:
            while len(self._open) >= self.order.open_shards:
                self._open.popitem(last=False)
            shard = self.manifest.shards[index]
            self._open[index] = read_shard(self.storage.shard_path(shard), shard, self.manifest)
        self._open.move_to_end(index)
        return self._open[index]


class BatchStream(Generic[T]):
    """The micro-batches of one rank, step after step, prepared ahead in one background thread.

    Iterating yields `transform(batch)` for micro-batch 0, 1, ... of `start_step`, then of the next step, and
    ends before `stop_step`. To resume, make a new stream with the next step: there is no other state. An
    exception in the thread is raised by the next `next()`, ahead of batches that are already prepared. Use as
    a context manager, or call `close`.

    Args:
        loader: used by the thread alone as long as the stream is open.
        plan: this rank's share of each step.
        start_step: the next training step, counted from 0.
        stop_step: the first step that is not wanted.
        transform: the objective's host work on a batch (its draws); runs in the thread.
        ahead: micro-batches kept ready.
    """

    def __init__(
        self,
        loader: TokenLoader,
        plan: BatchPlan,
        *,
        start_step: int,
        stop_step: int,
        transform: Callable[[TokenBatch], T],
        ahead: int = 4,
    ) -> None:
        assert ahead >= 1
        self.data_wait_s = 0.0  # total time that `next()` had to wait
        self._loader = loader
        self._plan = plan
        self._steps = range(start_step, stop_step)
        self._transform = transform
        self._ahead = ahead
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._finished = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._prepare, name="batch-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        start_s = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._finished or self._closed)
            self.data_wait_s += time.perf_counter() - start_s
            if self._error is not None:
                raise self._error
            if not self._ready:
                raise StopIteration
            batch = self._ready.popleft()
            self._changed.notify_all()
        return batch

    def close(self) -> None:
        """Stop the thread, which ends after the batch in hand; a hanging store is not waited for."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        try:
            for step in self._steps:
                for micro_step in range(self._plan.micro_steps):
                    batch = self._transform(self._loader.read(self._plan.sample_numbers(step, micro_step)))
                    if not self._put(batch):
                        return
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def _put(self, batch: T) -> bool:
        """Add a batch when there is room; False if the stream was closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._ahead or self._closed)
            if not self._closed:
                self._ready.append(batch)
                self._changed.notify_all()
            return not self._closed
