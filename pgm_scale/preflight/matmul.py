"""How fast this rank multiplies matrices: a slow one makes all others wait at every step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_WARM_UP_S = 0.2
_MEASURED_S = 0.4
_GPU_SIZE = 8192  # 1.1 TFLOP in bf16, one or two milliseconds
_CPU_SIZE = 256  # 34 MFLOP in fp32, well below a scheduler's time slice


def matmul_flops_per_s(device: torch.device) -> float:
    """The fastest of many products of one size, bf16 on a GPU and fp32 on a CPU.

    The fastest: what other processes take now and then is not this processor's fault, and one that is throttled
    is slow in all of them.
    """
    on_gpu = device.type == "cuda"
    size, dtype = (_GPU_SIZE, torch.bfloat16) if on_gpu else (_CPU_SIZE, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)

    def multiply() -> float:
        begin_s = time.perf_counter()
        torch.mm(a, b, out=product)
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin_s

    _repeat(multiply, _WARM_UP_S)
    return 2 * size**3 / _repeat(multiply, _MEASURED_S)


def _repeat(measure: Callable[[], float], seconds: float) -> float:
    """The least that `measure` gives within `seconds`."""
    deadline_s, least = time.perf_counter() + seconds, float("inf")
    while least == float("inf") or time.perf_counter() < deadline_s:
        least = min(least, measure())
    return least
