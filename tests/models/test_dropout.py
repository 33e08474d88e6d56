from __future__ import annotations

import pytest
import torch

from pgm_scale.models.dropout import dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_rate_scale_and_independence_of_neighbours(rate: float) -> None:
    torch.manual_seed(0)
    kept = dropout(torch.ones(401, 1003), rate, training=True).double()
    share = (kept > 0).double().mean()
    assert abs(share - (1 - rate)) < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5 + 2**-16
    assert set(kept.unique().tolist()) <= {0.0, kept.max().item()}
    assert kept.max().item() == pytest.approx(1 / (1 - rate), rel=0.02)  # rates are multiples of 2^-16
    flat = (kept > 0).double().flatten() - share
    for lag in (1, 2, 3, 4, 1003):  # four neighbours share one 64-bit draw
        correlation = (flat[lag:] * flat[:-lag]).mean() / flat.square().mean()
        assert abs(correlation) < 5 / kept.numel() ** 0.5, lag


def test_the_backward_pass_drops_the_same_elements() -> None:
    x = torch.full((7, 5), 2.0, requires_grad=True)
    y = dropout(x, 0.3, training=True)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * 2.0, y.detach())


def test_draws_follow_the_generator_and_evaluation_draws_nothing() -> None:
    x = torch.ones(33)
    torch.manual_seed(3)
    first = dropout(x, 0.5, training=True)
    torch.manual_seed(3)
    assert dropout(x, 0.5, training=False) is x
    assert torch.equal(first, dropout(x, 0.5, training=True))
    assert dropout(x.bfloat16(), 0.5, training=True).dtype == torch.bfloat16
