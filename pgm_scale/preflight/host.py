"""The node's processors, memory and limits, as far as this process may use them."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from pgm_scale.preflight.rows import Row

_MEMORY_PER_RANK_BYTES = 2 << 30  # torch with CUDA's libraries takes about that on the host
_CGROUPS = Path("/sys/fs/cgroup")


def host_rows(ranks: int, ranks_here: int) -> Iterator[Row]:
    """Args: ranks: of the run. ranks_here: of them, on this node."""
    yield _memory(ranks_here)
    yield _processors(ranks_here)
    yield _open_files(ranks)


def _memory(ranks_here: int) -> Row:
    memory = psutil.virtual_memory()
    limit_bytes = min(memory.total, cgroup_limit_bytes(_CGROUPS, Path("/proc/self/cgroup")) or memory.total)
    free_bytes = min(memory.available, limit_bytes)
    value = f"{free_bytes / 2**30:.1f} of {limit_bytes / 2**30:.1f} GiB free"
    if free_bytes >= ranks_here * _MEMORY_PER_RANK_BYTES:
        return Row("memory", value, number=limit_bytes)
    to_do = f"ask for more (sbatch --mem), or see who uses it: {ranks_here} rank(s) take 2 GiB each to start"
    return Row("memory", value, "warning", to_do, limit_bytes)


def cgroup_limit_bytes(mounted: Path, membership: Path) -> int | None:
    """The memory that the job may use by cgroup v2, the least of its own and its ancestors'; None: no limit."""
    try:
        lines = membership.read_text().splitlines()
        own = mounted / next(line for line in lines if line.startswith("0::")).removeprefix("0::").strip("/")
    except (OSError, StopIteration):
        return None
    limits = []
    for folder in (own, *own.parents):
        try:
            limits.append(int((folder / "memory.max").read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits, default=None)


def _processors(ranks_here: int) -> Row:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    value = f"{usable} of {there} for this rank"
    if usable == 1 and there >= 2 * ranks_here:
        to_do = (
            "give each task more (sbatch --cpus-per-task, srun --cpus-per-task): loader and saves need some"
        )
        return Row("processors", value, "warning", to_do, usable)
    return Row("processors", value, number=usable)


def _open_files(ranks: int) -> Row:
    """Each rank has sockets to all others, rank 0 twice for the store; shards and libraries take some hundreds."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 512 + 4 * ranks
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Row("open files", f"{soft} allowed")
    return Row(
        "open files", f"{soft} allowed", "bad", f"{needed} are needed: ulimit -n {needed} before srun", soft
    )
