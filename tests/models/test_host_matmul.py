"""oneDNN's products, forced on whatever the CPU, against torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgm_scale.models import chunking, host_matmul
from pgm_scale.models.blocks import FeedForward
from pgm_scale.models.chunked_nll import chunked_nll
from pgm_scale.models.chunking import VocabularyRange
from pgm_scale.models.host_matmul import HostLinear, fuses_gelu
from pgm_scale.models.layers import LOCAL_LAYERS


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.backends.mkldnn.is_available()
    monkeypatch.setattr(host_matmul, "onednn_is_faster", lambda: True)


def test_gelu_inside_the_product() -> None:
    torch.manual_seed(0)
    block = FeedForward(24, LOCAL_LAYERS)
    x = torch.randn(33, 24)
    expected = block[2](F.gelu(block[0](x), approximate="tanh"))
    assert expected.requires_grad
    assert not fuses_gelu(x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        assert fuses_gelu(x)
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert not fuses_gelu(x)
        assert not fuses_gelu(x.bfloat16())


def assert_gradients_agree(actual: Tensor, expected: Tensor, parameters: Sequence[Tensor]) -> None:
    gradients = (torch.autograd.grad(x.sum(), parameters) for x in (actual, expected))
    for own, its in zip(*gradients, strict=True):
        torch.testing.assert_close(own, its, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_and_its_gradients(has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = HostLinear(24, 40, has_bias)
    x = torch.randn(33, 24, requires_grad=True)
    weights = torch.randn(33, 40)
    parameters = [x, *linear.parameters()]
    actual, expected = linear(x), F.linear(x, linear.weight, linear.bias)
    assert "OneDNN" in type(actual.grad_fn).__name__
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_agree(actual * weights, expected * weights, parameters)


def test_only_fp32_outside_autocast_goes_there() -> None:
    linear = HostLinear(8, 8)
    assert "OneDNN" not in type(linear.double()(torch.randn(2, 8).double()).grad_fn).__name__
    linear.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(2, 8)).dtype == torch.bfloat16


def test_the_chunked_nll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_CPU_CHUNK_LOGITS", 8 * 50)
    products = 0

    def counted(*arguments: Any, **options: Any) -> Tensor:
        nonlocal products
        products += 1
        return host_matmul.onednn_product(*arguments, **options)

    monkeypatch.setattr(chunking, "onednn_product", counted)
    torch.manual_seed(0)
    arguments = [torch.randn(s, requires_grad=True) for s in ((21, 16), (50, 16), (50,))]
    targets_T, weights_T = torch.randint(50, (21,)), torch.rand(21)
    hidden_TH, weight_VH, bias_V = arguments
    actual = chunked_nll(hidden_TH, weight_VH, bias_V, targets_T, None, weights_T, VocabularyRange(50))
    expected = F.cross_entropy(F.linear(*arguments), targets_T, reduction="none")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert products == 2 * 3  # logits and hidden gradients of three chunks
    assert_gradients_agree(actual * weights_T, expected * weights_T, arguments)
