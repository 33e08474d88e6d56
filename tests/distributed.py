"""Run a function on several gloo ranks, each a process of its own, and bring back what rank 0 returned.

The processes are forked from a server that has imported the library once: its imports take seconds.
"""

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from pgm_scale.parallel.launch import Launch, free_port
from pgm_scale.parallel.mesh import connected


def _rank_main(
    rank: int, world_size: int, port: int, function: Callable, arguments: tuple, queue: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        with connected(Launch("torchrun", rank, world_size, rank, "127.0.0.1", port)) as mesh:
            result = function(mesh, *arguments)
        queue.put((rank, result, None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


def run_ranks(world_size: int, function: Callable, *arguments: Any) -> Any:
    """`function(mesh, *arguments)` on each rank; its result on rank 0 must be plain Python or numpy."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgm_scale.training.loop", "megatron.core.parallel_state"])
    queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, function, arguments, queue))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        results = {}
        for _ in processes:
            rank, result, error = queue.get(timeout=240)
            assert error is None, f"rank {rank} failed:\n{error}"
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return results[0]
