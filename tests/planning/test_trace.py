"""Against small computations that can be counted by hand."""

import pytest
import torch
from torch import nn

from pgm_scale.planning.trace import Footprint, Trace, Work, trace_passes
from tests.planning.cases import HARDWARE

T, H = 8, 16
STREAM = 4 * T * H  # bytes in fp32


def test_memory_of_a_linear_and_an_activation():
    first, second = nn.Linear(H, 4 * H), nn.Linear(4 * H, H)
    for parameter in (*first.parameters(), *second.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(T, H, requires_grad=True)
    x.grad = torch.zeros_like(x)

    footprint = trace_passes(
        lambda: second(nn.functional.gelu(first(x))),
        lambda result: torch.autograd.backward(result, torch.ones_like(result)),
        HARDWARE,
        "fp32",
    )
    # Kept: what gelu and the second linear read, and the result. The input and the weights were there.
    assert footprint.held_bytes == 4 * STREAM + 4 * STREAM + STREAM
    # Worst: in the second linear's backward pass, the gradients of the result, input, weight and bias.
    assert footprint.extra_bytes == STREAM + 4 * STREAM + 4 * (4 * H * H) + 4 * H
    assert footprint.forward.matmul_flops == 2 * 2 * T * H * 4 * H
    assert footprint.backward.matmul_flops == 2 * footprint.forward.matmul_flops


def test_memory_is_that_of_storages_not_of_views():
    with Trace(HARDWARE, "fp32") as trace:
        x = torch.ones(T, H)
        views = [x.t(), x[:2], x.view(-1)]
        assert trace.live_bytes == STREAM
        y = x + 1
        assert trace.live_bytes == 2 * STREAM
        y.add_(1)
        del x, views
        assert (trace.live_bytes, trace.peak_bytes) == (STREAM, 2 * STREAM)
    assert trace.work.kernels == 3  # views cost nothing


def test_time_is_the_slower_of_arithmetic_and_memory():
    with Trace(HARDWARE, "bf16") as trace:
        a = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
        trace.work = Work()
        a @ a
        assert trace.work.kernel_s == pytest.approx(2 * 4096**3 / (1e15 * 0.5))
        trace.work = Work()
        a + a
        assert trace.work.kernel_s == pytest.approx(3 * 2 * 4096**2 / (2e12 * 0.5))


def test_quantities_add_and_scale():
    one = Footprint(1.0, 2.0, Work(matmul_flops=3.0), Work(kernels=4.0))
    assert one + one == one * 2
    assert (one * 3 - one * 2) == one
