"""What the machine can do now: the peaks that every row is a fraction of."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ops.bench.measure import Resource, Side

MATMUL_SIZES = ((2048, 256, 1024), (2048, 1024, 1024), (2048, 2048, 2048))  # rows, inputs, outputs
CUDA_MATMUL_SIZES = ((8192, 4096, 4096), (8192, 8192, 8192))
BUFFER_BYTES = 512 << 20  # above the last cache of most machines
DISK_BYTES, DISK_CHUNK_BYTES, DISK_LIMIT_S = 1 << 30, 64 << 20, 3.0
REPEATS = 8


@dataclass(frozen=True)
class Machine:
    """A device and the best rates seen on it, in FLOP/s or bytes/s.

    Attributes:
        name: of the processor and its threads, or of the GPU.
        peaks: "memory" and the matmuls are the device's, "disk write" is the host's.
        matmul_backends: on a CPU, the fp32 rate of each of torch's two libraries; the peak is the better.
    """

    device: torch.device
    name: str
    threads: int
    torch_version: str
    peaks: dict[Resource, float]
    matmul_backends: dict[str, float]

    def fractions(self, sides: Sequence[Side], seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Of each side that has a resource: its rate, by the median of its repeats, over the machine's peak."""
        return {
            side.name: side.work / statistics.median(seconds[side.name]) / self.peaks[side.resource]
            for side in sides
            if side.resource is not None
        }


def measure_machine(device: torch.device) -> Machine:
    """Measure all peaks; about ten seconds, for which nothing else should run."""
    is_cuda, threads = device.type == "cuda", torch.get_num_threads()
    backends = {} if is_cuda else cpu_matmul_rates()
    peaks: dict[Resource, float] = {
        "fp32 matmul": cuda_matmul_rate(device, torch.float32) if is_cuda else max(backends.values()),
        "memory": memory_rate(device),
        "disk write": disk_write_rate(),
    }
    if is_cuda:
        peaks["bf16 matmul"] = cuda_matmul_rate(device, torch.bfloat16)
    name = torch.cuda.get_device_name(device) if is_cuda else f"{cpu_name()}, {threads} threads"
    return Machine(device, name, threads, torch.__version__, peaks, backends)


def cpu_name() -> str:
    """The processor's model name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def best_rate(work: float, run: Callable[[], object], device: torch.device) -> float:
    """Work a second in the fastest of the repeats, after one that is not counted."""
    seconds = []
    for _ in range(1 + REPEATS):
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_s)
    return work / min(seconds[1:])


@torch.no_grad()
def cpu_matmul_rates() -> dict[str, float]:
    """FLOP/s of fp32 linears: by torch.addmm, and by oneDNN on a weight that it has laid out for itself."""
    cpu = torch.device("cpu")
    rates = {"addmm": 0.0, "oneDNN": 0.0}
    for rows, inputs, outputs in MATMUL_SIZES:
        x, weight, bias = torch.rand(rows, inputs), torch.rand(outputs, inputs), torch.rand(outputs)
        sides: dict[str, Callable[[], object]] = {"addmm": partial(torch.addmm, bias, x, weight.T)}
        if torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            linear = torch.ops.mkldnn._linear_pointwise
            sides["oneDNN"] = partial(linear, x, packed, bias, "none", [], "")
        for name, run in sides.items():
            rates[name] = max(rates[name], best_rate(2.0 * rows * inputs * outputs, run, cpu))
    return rates


def cuda_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some square-ish products; fp32 without TF32, unless the process allows it."""
    rate = 0.0
    for rows, inputs, outputs in CUDA_MATMUL_SIZES:
        x = torch.rand(rows, inputs, device=device, dtype=dtype)
        weight = torch.rand(inputs, outputs, device=device, dtype=dtype)
        rate = max(rate, best_rate(2.0 * rows * inputs * outputs, partial(torch.mm, x, weight), device))
    return rate


def memory_rate(device: torch.device) -> float:
    """Bytes/s read and written by the best of a copy, a sum of two and a pass in place, over touched buffers.

    A copy alone is not the limit: a CPU reads a target's lines before it writes them, which nobody counts.
    """
    source, target = (torch.ones(BUFFER_BYTES // 4, device=device) for _ in range(2))
    return max(
        best_rate(2.0 * BUFFER_BYTES, lambda: target.copy_(source), device),
        best_rate(3.0 * BUFFER_BYTES, lambda: target.add_(source), device),
        best_rate(2.0 * BUFFER_BYTES, lambda: target.mul_(0.5), device),
    )


def disk_write_rate() -> float:
    """Bytes/s of one new file, written in order and synced, in the folder for temporary files (TMPDIR)."""
    chunk = os.urandom(DISK_CHUNK_BYTES)
    with tempfile.TemporaryFile() as file:
        start_s = time.perf_counter()
        written_bytes = 0
        while written_bytes < DISK_BYTES and time.perf_counter() - start_s < DISK_LIMIT_S:
            written_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return written_bytes / (time.perf_counter() - start_s)
