"""The norm by dot products equals torch's, also where fp32 sums would drift and where it is not finite."""

import math

import pytest
import torch

from pgm_scale.parallel.gradient_norm import total_norm


def test_it_is_the_norm_of_all_elements() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for shape in ((3, 5), (), (1 << 21) + 7, (0, 4))] + [torch.randn(4, 6).T]
    exact = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients))
    assert float(total_norm(gradients)) == pytest.approx(exact, rel=1e-6)
    plain = float(torch.nn.utils.get_total_norm(gradients))  # its fp32 sum is off by 3e-5
    assert float(total_norm(gradients)) == pytest.approx(plain, rel=1e-4)
    assert float(total_norm([])) == 0.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_element_that_is_not_finite_shows(bad: float) -> None:
    gradients = [torch.ones(5), torch.ones((1 << 20) + 3)]
    gradients[1][-1] = bad
    assert not math.isfinite(float(total_norm(gradients)))
