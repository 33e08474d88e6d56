"""Saves: their rate against the disk's own, and the training time that a save in the background costs."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch

from ops.bench.bench_run import BenchRun
from ops.bench.machine import Machine
from ops.bench.measure import Row, Side, Target, ratio, take_turns
from ops.bench.models import PGM
from pgm_scale.checkpoint import CheckpointStore, Fragment
from pgm_scale.checkpoint.direct_file import DirectFile
from pgm_scale.checkpoint.host_buffers import HostBuffers, chunks_of
from pgm_scale.config import PGMObjectiveConfig
from pgm_scale.parallel.launch import Launch, free_port
from pgm_scale.parallel.mesh import Mesh, connected
from pgm_scale.tensor_slices import TensorSlice

STATE_BYTES = 512 << 20
TENSORS = 64
SEQUENCES, LENGTH = 2, 256
SAVE_REPEATS, TRAINING_S = 7, 30.0


def rows(machine: Machine) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield from save_rate(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        yield from time_lost(Path(folder))


def save_rate(folder: Path) -> Iterator[Row]:
    """The same bytes in one file, synced: as a checkpoint with hash and manifest, and by themselves."""
    values = torch.rand(TENSORS, STATE_BYTES // 4 // TENSORS)
    whole = TensorSlice.whole(values[0].shape)
    store, chunks = CheckpointStore(folder), list(chunks_of(values, HostBuffers()))

    def save() -> None:
        store.save(1, [("weight", Fragment(f"p{i}", whole, 0, part)) for i, part in enumerate(values)], {})

    def write() -> None:
        with open(folder / "raw", "wb", buffering=0) as file:
            for chunk in chunks:
                file.write(chunk.data)
            os.fsync(file.fileno())

    def write_directly() -> None:
        with DirectFile(folder / "raw") as file:
            for chunk in chunks:
                file.write(chunk)
            file.sync()

    def remove() -> None:
        shutil.rmtree(store.folders.folder, ignore_errors=True)
        (folder / "raw").unlink(missing_ok=True)

    sides = [
        Side("save", save, STATE_BYTES, undo=remove),
        Side("write and fsync", write, STATE_BYTES, undo=remove),
        Side("the same with O_DIRECT", write_directly, STATE_BYTES, undo=remove),
    ]
    seconds = take_turns(sides, SAVE_REPEATS)
    work = {side.name: side.work for side in sides}
    for raw in (side.name for side in sides[1:]):
        yield Row(
            f"save rate of {STATE_BYTES >> 20} MiB, against {raw}",
            ratio(seconds, raw, "save"),
            "of the raw rate",
            Target(0.6, 0.85),
            {name: seconds[name] for name in ("save", raw)},
            {name: work[name] for name in ("save", raw)},
            note="one SHA-256 a file: its rate on one core is the limit where the disk is faster",
        )


class SavingRun(BenchRun):
    """The bench's PGM, and saves of it."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        super().__init__(folder, mesh, PGM, PGMObjectiveConfig(), SEQUENCES, LENGTH)
        self.state_bytes = 16 * sum(entry.weight.numel() for entry in self.engine.state)

    def steps_beside_a_save(self) -> list[float]:
        """Seconds of the steps from the start of a save in the background until it is committed."""
        start_s = perf_counter()
        self.checkpointer.start(1, {})
        seconds = [perf_counter() - start_s + self.step()]
        while self.checkpointer.store.under_way is not None:
            seconds.append(self.step())
        self._remove()
        return seconds

    def save(self) -> float:
        """Seconds of a save that training waits for."""
        start_s = perf_counter()
        self.checkpointer.save(1, {})
        seconds = perf_counter() - start_s
        self._remove()
        return seconds

    def _remove(self) -> None:
        shutil.rmtree(self.checkpointer.store.folders.folder)


def time_lost(folder: Path) -> Iterator[Row]:
    """What a save in the background costs training that wants all cores, and one that leaves a core free.

    The second is how a GPU's host is: its training needs few cores, and the hash of a save takes one.
    """
    threads = torch.get_num_threads()
    with connected(Launch("single", 0, 1, 0, "127.0.0.1", free_port())) as mesh:
        run = SavingRun(folder, mesh)
        run.steps_beside_a_save()  # warms up: the buffers are touched for the first time
        for used in sorted({threads, max(1, threads - 1)}, reverse=True):
            torch.set_num_threads(used)
            where = "training on all cores" if used == threads else "one core free, as beside a GPU"
            yield from _time_lost(run, where)
        torch.set_num_threads(threads)


def _time_lost(run: SavingRun, where: str) -> Iterator[Row]:
    """How long training stands still, and by how much the steps beside a save are slower.

    The steps' own noise adds up over a save; medians, and the note, which has the standard error, account for it.
    """
    names = ("step", "step beside a save", "save", "standing still")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start_s, saves = perf_counter(), 0
    while saves < 2 or perf_counter() - start_s < TRAINING_S:
        run.checkpointer.seconds = 0.0
        beside_s = run.steps_beside_a_save()
        seconds["standing still"].append(run.checkpointer.seconds)
        seconds["step beside a save"] += beside_s
        seconds["save"].append(run.save())
        seconds["step"] += [run.step() for _ in beside_s]
        saves += 1
    median_s = {name: statistics.median(values) for name, values in seconds.items()}
    beside, steps = seconds["step beside a save"], len(seconds["step"]) / saves
    slower_s = (median_s["step beside a save"] - median_s["step"]) * steps
    quartiles = statistics.quantiles(beside, n=4)
    # Of the difference of two medians of normal noise, whose quartiles are 1.35 deviations apart.
    error_s = steps * 1.25 * (quartiles[2] - quartiles[0]) / 1.35 * (2 / len(beside)) ** 0.5
    size = f"{run.state_bytes / 1e6:.0f} MB, H 256, L {LENGTH}, batch {SEQUENCES}"
    yield Row(
        f"training time lost to an asynchronous save, against a synchronous one, {where}; {size}",
        (median_s["standing still"] + slower_s) / median_s["save"],
        "of it",
        Target(0.1, 0.03, lower_is_better=True),
        seconds,
        note=f"it stood still for {median_s['standing still']:.3f} s, and {steps:.0f} steps beside the save were "
        f"slower by {slower_s:.3f} +- {error_s:.3f} s in all",
    )
