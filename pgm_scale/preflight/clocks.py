"""How far the clocks of the nodes are apart: file times, locks' heartbeats and logs of many nodes rely on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pgm_scale.parallel.mesh import Mesh

_PINGS = 8


@dataclass(frozen=True)
class ClockOffset:
    """How far a node's clock is ahead of rank 0's, and half the round trip in which that was seen."""

    offset_s: float
    bound_s: float


def clock_offset(mesh: Mesh, leaders: Sequence[int], clock_s: Callable[[], float]) -> ClockOffset | None:
    """Rank 0 pings the first rank of each node, one after the other; the fastest of a few pings counts.

    Args:
        leaders: the first rank of each node, rank 0 among them.

    Returns:
        On a leader its node's offset, on other ranks None.
    """
    if mesh.is_main:
        for leader in leaders[1:]:
            _ping(leader, clock_s)
        return ClockOffset(0.0, 0.0)
    return _pong(clock_s) if mesh.rank in leaders else None


def _ping(leader: int, clock_s: Callable[[], float]) -> None:
    answer = torch.zeros(1, dtype=torch.float64)
    best = torch.tensor([0.0, float("inf")], dtype=torch.float64)
    for _ in range(_PINGS):
        begin_s = clock_s()
        dist.send(answer, leader)
        dist.recv(answer, leader)
        bound_s = (clock_s() - begin_s) / 2
        if bound_s < best[1]:
            best = torch.tensor([answer.item() - begin_s - bound_s, bound_s], dtype=torch.float64)
    dist.send(best, leader)


def _pong(clock_s: Callable[[], float]) -> ClockOffset:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(_PINGS):
        dist.recv(message, 0)
        message[0] = clock_s()
        dist.send(message, 0)
    best = torch.zeros(2, dtype=torch.float64)
    dist.recv(best, 0)
    return ClockOffset(*best.tolist())
