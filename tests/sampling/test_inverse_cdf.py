import numpy as np
import pytest
import torch

from pgm_scale.sampling.inverse_cdf import BLOCK_TOKENS, inverse_cdf


def plain(weights_QV: torch.Tensor, uniforms_Q: torch.Tensor) -> np.ndarray:
    """The whole cumulative sum in float64, one row after the other."""
    drawn = []
    for weights_V, uniform in zip(weights_QV.double().numpy(), uniforms_Q.numpy(), strict=True):
        cumulative_V = np.cumsum(weights_V)
        drawn.append(np.searchsorted(cumulative_V, uniform * cumulative_V[-1], side="right"))
    return np.array(drawn)


@pytest.mark.parametrize("vocab_size", [1, 5, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 1000, 5120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_plain_inverse_cdf(vocab_size, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    weights_QV = (4 * torch.randn(400, vocab_size, generator=generator, dtype=dtype)).softmax(-1)
    weights_QV[:, 1:] *= torch.rand(400, vocab_size - 1, generator=generator) < 0.6  # and zeros among them
    uniforms_Q = torch.rand(400, generator=generator, dtype=torch.float64)
    np.testing.assert_array_equal(inverse_cdf(weights_QV, uniforms_Q).numpy(), plain(weights_QV, uniforms_Q))


@pytest.mark.parametrize("vocab_size", [7, 3 * BLOCK_TOKENS, 3 * BLOCK_TOKENS + 9])
def test_a_token_without_weight_is_never_drawn(vocab_size):
    """One token has all the weight, wherever it is; the uniform may be the lowest or the highest there is."""
    where_Q = torch.arange(vocab_size)
    weights_QV = torch.zeros(vocab_size, vocab_size).scatter_(1, where_Q[:, None], 0.1)
    for uniform in (0.0, 0.3, 1 - 2.0**-53):
        uniforms_Q = torch.full((vocab_size,), uniform, dtype=torch.float64)
        assert torch.equal(inverse_cdf(weights_QV, uniforms_Q), where_Q)


def test_uniforms_at_a_boundary_between_blocks():
    weights_1V = torch.ones(1, 2 * BLOCK_TOKENS)
    for uniform, token in ((0.5 - 2.0**-53, BLOCK_TOKENS - 1), (0.5, BLOCK_TOKENS)):
        assert inverse_cdf(weights_1V, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_rows_that_are_not_finite_give_some_token():
    weights_QV = torch.tensor([[float("nan")] * 600, [0.0] * 600])
    drawn_Q = inverse_cdf(weights_QV, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert ((drawn_Q >= 0) & (drawn_Q < 600)).all()
