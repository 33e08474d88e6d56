"""Which rank holds the others up: each rank's own seconds, compared with those of the ranks that do the same work.

A rank's own seconds are those of its forward passes and those for which it waits for its data; in all others it may
wait for other ranks. What cannot be told apart: ranks that meet inside the forward pass (tensor parallelism,
ZeRO-3) are slow together, so that with ZeRO-3 over all ranks only slow data is seen. The backward pass is left out,
as gradients are reduced in it; what slows it down on one rank slows the forward pass too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pgm_scale.holder import node_name
from pgm_scale.parallel.mesh import Mesh

_PARTS = ("data", "compute")
# A machine with more processes than cores makes some rank slow for a while, and another one later: only who is so
# in so many intervals in a row stays so.
_INTERVALS = 3
# A rank is not slow for less than this share of the time between two records, nor for what is an operating
# system's noise in short ones.
_FLOOR_SHARE = 0.1
_FLOOR_S = 0.2


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow, and the part of its work that is slowest by the seconds it costs."""

    rank: int
    host: str
    ratio: float
    part: str

    def record(self) -> dict[str, Any]:
        return {
            "slowest_rank": self.rank,
            "slowest_host": self.host,
            "slowest_ratio": self.ratio,
            "slowest_part": self.part,
        }

    def __str__(self) -> str:
        what = {"data": "waiting for data", "compute": "computing"}[self.part]
        return (
            f"rank {self.rank} on host {self.host} is slow in {what}: {self.ratio:.1f} times the own seconds of "
            "the other ranks of its stage"
        )


def slowest_rank(seconds_RP: np.ndarray, stages_R: Sequence[int]) -> tuple[int, float, float, str] | None:
    """Rank, ratio, excess (s) and slowest part of the rank that is slowest against the median of the others.

    Args:
        seconds_RP: own seconds [ranks, parts].
        stages_R: the pipeline stage of each rank; ranks of one stage do the same work.

    Returns:
        None when no stage has two ranks.
    """
    found = []
    stages = np.asarray(stages_R)
    for stage in np.unique(stages):
        ranks = np.flatnonzero(stages == stage)
        if len(ranks) < 2:
            continue
        totals_R = seconds_RP[ranks].sum(1)
        worst = int(totals_R.argmax())  # whoever has most is also farthest from the median of the others
        others_OP = np.delete(seconds_RP[ranks], worst, axis=0)
        usual_s = float(np.median(others_OP.sum(1)))
        part = int((seconds_RP[ranks[worst]] - np.median(others_OP, axis=0)).argmax())
        ratio = float(totals_R[worst]) / max(usual_s, 1e-9)
        found.append((int(ranks[worst]), ratio, float(totals_R[worst]) - usual_s, _PARTS[part]))
    return max(found, key=lambda each: each[1], default=None)


class ForwardClock:
    """Seconds of a module's forward passes in training; on a GPU by events, read once they have passed."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._start: Any = None
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def take(self) -> float:
        """The seconds since the last call; call it when the device has finished a step."""
        self._read_events()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, module: nn.Module, _: Any) -> None:
        if module.training:
            self._start = self._now()

    def _end(self, module: nn.Module, *_: Any) -> None:
        if self._start is None:
            return
        start, self._start = self._start, None
        if not self._on_gpu:
            self._seconds += self._now() - start
            return
        self._pairs.append((start, self._now()))
        if len(self._pairs) % 256 == 0:  # a record may be far
            self._read_events()

    def _read_events(self) -> None:
        while self._pairs and self._pairs[0][1].query():
            start, end = self._pairs.popleft()
            self._seconds += start.elapsed_time(end) / 1000


class StragglerReport:
    """Finds the rank that stays slow, record after record. Construction and `find` are collective."""

    def __init__(self, module: nn.Module, mesh: Mesh, slow_ratio: float) -> None:
        self._mesh, self._slow_ratio = mesh, slow_ratio
        places = mesh.gather((mesh.stage, node_name()))
        self._stages = [stage for stage, _ in places]
        self._hosts = [host for _, host in places]
        self._clock = ForwardClock(module, mesh.device)
        self._since_s: float | None = None
        self._slow = (-1, 0)  # the rank that was slow in the newest interval, and in how many in a row
        self.ratio: float | None = None  # of the slowest rank at the last record, slow or not

    def find(self, data_wait_s: float) -> Straggler | None:
        """The rank that was slow in this interval between two records and in the ones before it.

        The first record of a session holds its warm-up and counts for nothing.

        Args:
            data_wait_s: that this rank has waited for data since the last record.
        """
        if self._mesh.world_size == 1:
            return None
        now_s, since_s = time.perf_counter(), self._since_s
        self._since_s = now_s
        interval_s = 0.0 if since_s is None else now_s - since_s
        numbers = self._mesh.gather_numbers(np.array([data_wait_s, self._clock.take(), interval_s]))
        slowest = slowest_rank(numbers[:, : len(_PARTS)], self._stages)
        if slowest is None or since_s is None:
            return None
        rank, self.ratio, excess_s, part = slowest
        floor_s = max(_FLOOR_S, _FLOOR_SHARE * float(numbers[0, -1]))
        is_slow = self.ratio > self._slow_ratio and excess_s >= floor_s
        before, intervals = self._slow
        self._slow = (rank, intervals + 1 if rank == before else 1) if is_slow else (-1, 0)
        if self._slow[1] < _INTERVALS:
            return None
        return Straggler(rank, self._hosts[rank], self.ratio, part)
