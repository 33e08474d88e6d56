"""All-reduces whose sums are known exactly, and their bus bandwidth: of all ranks, in each node, between nodes.

Each node is measured with its neighbour in a ring of all nodes, so that one slow node is slow with both of its
neighbours, and one slow link with one of them. gloo on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from pgm_scale.parallel.mesh import Mesh

Scope = Literal["all", "node", "pair"]
Group = Any  # a process group; None is that of all ranks
Reduce = Callable[[torch.Tensor, Group], None]

_SIZES = (1, 1_001, 262_147)  # elements; odd ones leave a rest in every way to cut them
_GPU_BYTES, _CPU_BYTES = 256 << 20, 4 << 20
_REPEATS = 8


@dataclass(frozen=True)
class AllReduce:
    """What one rank saw of one group.

    Attributes:
        nodes: whose ranks took part; the one node, the pair, or all.
        exact: every sum was the known one, bit for bit.
        bytes_per_s: bus bandwidth, 2 (n - 1) / n x bytes / seconds of the fastest of some repeats.
    """

    scope: Scope
    nodes: tuple[str, ...]
    ranks: int
    exact: bool
    bytes_per_s: float


def all_reduce(tensor: torch.Tensor, group: Group) -> None:
    """In place, the sum over the group's ranks."""
    dist.all_reduce(tensor, group=group)


def measure_network(
    mesh: Mesh, ranks_of: dict[str, list[int]], reduce: Reduce = all_reduce
) -> list[AllReduce]:
    """Measure each group of which this rank is a member. Collective: each rank goes through all of it.

    Args:
        ranks_of: the ranks of each node, of all nodes in the same order on all ranks.
    """
    nodes, found = list(ranks_of), []
    mine = next(node for node, ranks in ranks_of.items() if mesh.rank in ranks)
    rounds: list[tuple[Scope, list[tuple[str, ...]]]] = [("node", [(node,) for node in nodes])]
    rounds += [("pair", list(pairs)) for pairs in ring_rounds(nodes)]
    for number, (scope, groups) in enumerate(rounds):
        mesh.gather(None)  # all at once, as in training
        mesh.progress(f"preflight: all-reduce, round {number + 1} of {len(rounds)}")
        members = next((group for group in groups if mine in group), ())
        ranks = sorted(rank for node in members for rank in ranks_of[node]) or [mesh.rank]
        # Only its ranks meet to make a group: all would wait for each other at each pair. Every rank makes one,
        # also alone: torch names groups by how many a process has made, and would wait for ever under two names.
        process_group = dist.new_group(ranks, use_local_synchronization=True)
        if len(ranks) > 1:
            found.append(_measure(mesh, scope, members, ranks, process_group, reduce))
        dist.destroy_process_group(process_group)
    mesh.gather(None)
    mesh.progress("preflight: all-reduce of all ranks")
    if mesh.world_size > 1:
        found.append(_measure(mesh, "all", tuple(nodes), list(range(mesh.world_size)), None, reduce))
    return found


def ring_rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Each node with its neighbours in a ring, in rounds in which a node is in one pair at most."""
    count = len(nodes)
    if count < 2:
        return []
    if count == 2:
        return [[(nodes[0], nodes[1])]]
    pairs = [(nodes[i], nodes[(i + 1) % count]) for i in range(count)]
    even, odd = pairs[0 : count - 1 : 2], pairs[1::2]
    if count % 2 == 0:
        return [even, odd]
    return [even, odd, [pairs[-1]]]


def _measure(
    mesh: Mesh, scope: Scope, nodes: tuple[str, ...], ranks: list[int], group: Group, reduce: Reduce
) -> AllReduce:
    exact = [_is_exact(mesh, ranks, count, dtype, group, reduce) for count, dtype in _trials(mesh)]
    rate = _bus_bytes_per_s(mesh, len(ranks), group, reduce)
    return AllReduce(scope, nodes, len(ranks), all(exact), rate)


def _trials(mesh: Mesh) -> list[tuple[int, torch.dtype]]:
    trials = [(count, torch.float32) for count in _SIZES]
    if mesh.device.type == "cuda":
        trials += [(count, torch.bfloat16) for count in (*_SIZES, _GPU_BYTES // 2)]
    return trials


def contribution(rank: int, count: int, spread: int) -> torch.Tensor:
    """Small whole numbers: element i is 1 + rank % 3 where (i + rank) % spread is 0, else 0."""
    pattern = torch.tensor([(1 + rank % 3) * ((c + rank) % spread == 0) for c in range(spread)])
    return pattern.repeat(-(-count // spread))[:count]


def spread_for(ranks: Sequence[int]) -> int:
    """So that no sum of contributions is above 3 x 64: bf16 is exact for whole numbers up to 256."""
    return max(3, -(-(max(ranks) + 1) // 64))


def _is_exact(
    mesh: Mesh,
    ranks: list[int],
    count: int,
    dtype: torch.dtype,
    group: Group,
    reduce: Reduce,
) -> bool:
    spread = spread_for(ranks)
    tensor = contribution(mesh.rank, count, spread).to(mesh.device, dtype)
    reduce(tensor, group)
    # One period is enough of the sum; it is repeated where it is compared.
    period = torch.stack([contribution(rank, spread, spread) for rank in ranks]).sum(dim=0)
    expected = period.to(mesh.device, dtype).repeat(-(-count // spread))[:count]
    return torch.equal(tensor, expected)


def _bus_bytes_per_s(mesh: Mesh, ranks: int, group: Group, reduce: Reduce) -> float:
    on_gpu = mesh.device.type == "cuda"
    tensor = torch.zeros((_GPU_BYTES if on_gpu else _CPU_BYTES) // 4, device=mesh.device)
    least_s = float("inf")
    for _ in range(1 + _REPEATS):  # the first makes the connections, and is never the fastest
        begin_s = time.perf_counter()
        reduce(tensor, group)
        if on_gpu:
            torch.cuda.synchronize(mesh.device)
        least_s = min(least_s, time.perf_counter() - begin_s)
    return 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size() / least_s
