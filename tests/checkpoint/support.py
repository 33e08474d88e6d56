"""Small checkpoints, ranks as threads, and children that are killed in the middle of what they do."""

from __future__ import annotations

import math
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pgm_scale.checkpoint import CheckpointStore, Fragment, Kind, Peers
from pgm_scale.tensor_slices import TensorSlice

SHAPES = {"backbone.w": (5, 7), "backbone.b": (7,), "scale": ()}
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq", "ema")


def whole_tensors(step: int) -> dict[tuple[Kind, str], torch.Tensor]:
    """What a model holds at `step`: different values at every step."""
    generator = torch.Generator().manual_seed(step)
    return {(kind, name): torch.randn(SHAPES[name], generator=generator) for kind in KINDS for name in SHAPES}


def fragments_of(
    tensors: dict[tuple[Kind, str], torch.Tensor], rank: int, world_size: int
) -> list[tuple[Kind, Fragment]]:
    """The `rank`-th of `world_size` equal ranges of every tensor (some are empty)."""
    owned = []
    for (kind, name), tensor in tensors.items():
        share = math.ceil(tensor.numel() / world_size)
        start = min(rank * share, tensor.numel())
        values = tensor.flatten()[start : start + share]
        owned.append((kind, Fragment(name, TensorSlice.whole(tensor.shape), start, values)))
    return owned


def save_step(run_folder: Path, step: int, world_size: int = 2) -> None:
    """Commit `whole_tensors(step)` as `world_size` ranks would."""
    folders = CheckpointStore(run_folder).folders
    assert folders.begin(step)
    tensors = whole_tensors(step)
    entries = [folders.write_rank(step, r, fragments_of(tensors, r, world_size)) for r in range(world_size)]
    folders.commit(step, entries, {"step": step})


def assert_step_is_good(store: CheckpointStore, step: int) -> None:
    """The stored values and the state are exactly those of `step`."""
    assert store.state(step) == {"step": step}
    expected = whole_tensors(step)
    for kind in KINDS:
        stored = store.read_full(step, kind)
        assert stored.keys() == SHAPES.keys()
        for name, tensor in stored.items():
            assert torch.equal(tensor, expected[kind, name])


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:08d}"


def run_ranks(world_size: int, program: Callable[[Peers], Any]) -> list[Any]:
    """Run `program` as that many ranks (threads); the result of each, or the exception it raised."""
    barrier = threading.Barrier(world_size, timeout=20)
    slots: list[Any] = [None] * world_size
    results: list[Any] = [None] * world_size

    def main(rank: int) -> None:
        def all_gather(value: Any) -> list[Any]:
            slots[rank] = pickle.dumps(value)  # as torch.distributed does: nothing is shared
            barrier.wait()
            values = [pickle.loads(slot) for slot in slots]
            barrier.wait()
            return values

        try:
            results[rank] = program(Peers(rank, world_size, all_gather))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_child(action: Callable[[], Any]) -> tuple[int, Any]:
    """Run `action` in a forked process: wait status, and what it returned or raised (None if killed)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            result = action()
        except BaseException as error:
            result = error
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    return status, pickle.loads(data) if data else None


_KILL_POINTS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "utime")


def kill_before_call(number: int, log: Path | None = None) -> None:
    """In a child: die by SIGKILL at the `number`-th durable operation on files; `log` gets each one's name."""
    count = 0

    def wrap(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def wrapped(target: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            if log is not None:
                path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
                with open(log, "a") as file:
                    file.write(f"{name} {os.path.basename(path)}\n")
            return original(target, *arguments, **options)

        return wrapped

    for name in _KILL_POINTS:
        setattr(os, name, wrap(name))
