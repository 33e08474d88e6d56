"""The parts of the engine against slow and obvious forms of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pgm_scale.models.layers import RotaryTable, rotate
from pgm_scale.sampling.engine import fold, graphs
from pgm_scale.sampling.engine.first_block import GrowingAttention
from pgm_scale.sampling.engine.graphs import StepGraphs
from pgm_scale.sampling.engine.linear import PlainLinear, fixed_linear
from pgm_scale.sampling.engine.rotary import Rotation
from pgm_scale.sampling.engine.uniform import UniformSampler
from pgm_scale.sampling.engine.values import Values, attend_averaging, few_queries
from tests.sampling.engine.support import batch_of, known_tokens, partition


def attention(q_BND: torch.Tensor, k_BND: torch.Tensor, v_BND: torch.Tensor) -> torch.Tensor:
    """`[B, m, N, D]` of `[B, m or n, N, D]` in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q_BND, k_BND, v_BND))
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_reordered_linears_equal_plain_ones(bias):
    torch.manual_seed(0)
    for rows in (0, 1, 7, 300):
        weight, x, residual = torch.randn(48, 32), torch.randn(rows, 32), torch.randn(rows, 48)
        offsets = torch.randn(48) if bias else None
        fast, plain = fixed_linear(weight, offsets), PlainLinear(weight, offsets)
        assert rows == 0 or type(fast) is not PlainLinear
        before = residual.clone()
        torch.testing.assert_close(fast(x), plain(x), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(fast.gelu(x), plain.gelu(x), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(fast.plus(residual, x), plain.plus(residual, x), atol=1e-4, rtol=1e-5)
        assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_keeps_all_scores(dtype):
    torch.manual_seed(0)
    table = RotaryTable(50, 8)
    rotation = Rotation(table, dtype)
    positions_T = torch.randperm(50)[:20]
    weight, x_TH = torch.randn(2 * 3 * 8, 24, dtype=dtype), torch.randn(20, 24, dtype=dtype)
    ordered = torch.cat([rotation.order_rows(part) for part in weight.chunk(2)])
    q, k = rotation.rotate_(
        (x_TH @ ordered.T).view(20, 2, 3, 8), rotation.table_L[positions_T][:, None]
    ).unbind(1)
    plain_q, plain_k = ((x_TH @ part.T).view(20, 3, 8) for part in weight.chunk(2))
    rotary = table(positions_T, dtype)
    expected = torch.einsum("tnd,snd->tsn", rotate(plain_q, rotary), rotate(plain_k, rotary))
    actual = torch.einsum("tnd,snd->tsn", q, k)
    torch.testing.assert_close(actual, expected, atol=1e-3 if dtype == torch.float32 else 1.0, rtol=1e-4)


@pytest.mark.parametrize("has_bias", [True, False])
def test_averaging_before_the_projection_changes_nothing(has_bias):
    torch.manual_seed(0)
    sequences, queries, tokens, heads, head_size, hidden = 3, 5, 11, 4, 6, 24
    q_QND = torch.randn(sequences * queries, heads, head_size)
    k_TND = torch.randn(sequences * tokens, 2, heads, head_size)[:, 1]  # as one of several blocks' keys
    x_TH = torch.randn(sequences * tokens, hidden)
    bias = torch.randn(hidden) if has_bias else None
    values = Values(torch.randn(hidden, hidden), bias, heads)
    q_BmND, k_BnND, x_BnH, v_BnND = (
        x.unflatten(0, (sequences, -1)) for x in (q_QND, k_TND, x_TH, values.of_tokens(x_TH))
    )
    expected = attention(q_BmND, k_BnND, v_BnND).flatten(0, 1).float()
    actual = attend_averaging(q_BmND, k_BnND, x_BnH, values)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert few_queries(8, 4, 256)
    assert not few_queries(86, 4, 256)
    assert few_queries(10_000, 1, 256)


@pytest.mark.parametrize(
    ("scale", "tolerance"),
    [(1.0, 1e-5), (30.0, 1e-4)],  # scores reach 4 and 120: rounded to 5e-7 and 1e-5
    ids=["flat", "peaked"],
)
def test_growing_attention_equals_recomputation(scale, tolerance):
    """400 tokens in 99 groups of 1 to 112; what all have read is compared at every fiftieth token."""
    torch.manual_seed(0)
    sequences, heads, head_size, sizes = 2, 3, 8, [20, *[1] * 40, *[2, 9, 1] * 19, 112]
    total = sum(sizes)
    q, k, v = (torch.randn(sequences, total, heads, head_size) for _ in range(3))
    q *= scale
    growing = GrowingAttention((sequences, total, heads, head_size), torch.device("cpu"))
    start = 0
    for size in sizes:
        new = slice(start, start + size)
        q_TND, k_TND, v_TND = (x[:, new].flatten(0, 1) for x in (q, k, v))
        growing.add(q_TND, k_TND, v_TND, start)
        start += size
        if start % 50 < size:
            seen = slice(0, start)
            expected = attention(q[:, seen], k[:, seen], v[:, seen]).flatten(0, 1).float()
            torch.testing.assert_close(growing.results(start), expected, atol=tolerance, rtol=tolerance)
    assert start == total


class NoWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for the device, and counts the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.name()
        for waits in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"):
            assert waits not in name.split("::")[1].split(".")[0], name
        assert name != "aten::repeat_interleave.Tensor", name
        if name.startswith(("aten::index.", "aten::index_put")):
            assert all(index is None or index.dtype != torch.bool for index in arguments[1]), (
                "nonzero of a mask"
            )
        self.operations += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("rules", [{}, {"top_k": 3, "top_p": 0.9, "temperature": 0.5}])
def test_no_step_of_the_uniform_sampler_waits_for_the_device(rules):
    """Also what a CUDA graph needs: nothing indexes by a mask, nothing asks for a value."""
    batch = batch_of(known_tokens([2, 2]), **rules)
    with torch.inference_mode():
        sampler = UniformSampler(fold(partition()))
        with NoWaiting() as mode:
            sampler(batch)
    assert mode.operations > 100


def test_that_waiting_is_noticed():
    with NoWaiting(), pytest.raises(AssertionError, match="nonzero"):
        torch.ones(3)[torch.ones(3) > 0]
    with NoWaiting(), pytest.raises(AssertionError, match="local_scalar"):
        torch.ones(3).sum().item()


def test_a_shape_runs_plainly_then_is_captured_then_replayed(monkeypatch):
    """torch's graphs replaced by a recording: there is no GPU to capture on."""
    log: list[str] = []

    class FakeGraph:
        def replay(self) -> None:
            log.append("replay")

        def pool(self) -> str:
            return "pool"

    class FakeCapture:
        def __init__(self, graph: Any, pool: Any):
            log.append(f"capture into {pool}")

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: Any) -> None:
            pass

    monkeypatch.setattr(graphs.torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(graphs.torch.cuda, "graph", FakeCapture)
    steps = StepGraphs(torch.device("cuda"))
    for shape in (1, 2, 1, 2, 1):
        steps.run(shape, lambda: log.append("step"))
    captures = ["capture into None", "step", "replay", "capture into pool", "step", "replay"]
    assert log == ["step", "step", *captures, "replay"]
    for plain in (StepGraphs(torch.device("cpu")), StepGraphs(torch.device("cuda"), capturable=False)):
        log.clear()
        for _ in range(3):
            plain.run(1, lambda: log.append("step"))
        assert log == ["step"] * 3
