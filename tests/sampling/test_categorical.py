from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.models.vocabulary import VocabularyLinear
from pgm_scale.sampling.analytic import AnalyticWeights
from pgm_scale.sampling.categorical import TokenDraw, TokenRules
from pgm_scale.sampling.inverse_cdf import inverse_cdf
from tests.sampling.chi_square import p_value

MASK = 3


def probabilities(logits, **rules) -> np.ndarray:
    weights_QV = TokenRules((MASK,), **rules)(torch.as_tensor(logits).clone())
    return (weights_QV / weights_QV.sum(-1, keepdim=True)).numpy()


def logits_of(*shares: float) -> torch.Tensor:
    """One query whose probabilities are `shares`, in proportion."""
    return torch.tensor([shares], dtype=torch.float32).log()


def test_mask_is_removed_and_the_rest_renormalised():
    np.testing.assert_allclose(
        probabilities(logits_of(0.2, 0.1, 0.1, 0.6)), [[0.5, 0.25, 0.25, 0]], atol=1e-7
    )


def test_temperature_divides_the_logits():
    p = np.array([0.5, 0.3, 0.2])
    expected = p**0.5 / (p**0.5).sum()
    np.testing.assert_allclose(
        probabilities(logits_of(*p, 1e-9), temperature=2.0)[0, :3], expected, atol=1e-7
    )


def test_nucleus_keeps_the_token_that_crosses_p_and_ignores_the_mask():
    # Without the mask: 0.5, 0.3, 0.2. Were the 0.6 of the mask counted, p = 0.6 would keep nothing else.
    logits = logits_of(0.12, 0.2, 0.08, 0.6)
    np.testing.assert_allclose(probabilities(logits, top_p=0.6), [[0.375, 0.625, 0, 0]], atol=1e-7)
    np.testing.assert_allclose(probabilities(logits, top_p=0.49), [[0, 1, 0, 0]], atol=1e-7)
    np.testing.assert_allclose(probabilities(logits, top_p=0.81), [[0.3, 0.5, 0.2, 0]], atol=1e-7)
    np.testing.assert_allclose(probabilities(logits, top_p=1e-9), [[0, 1, 0, 0]], atol=1e-7)


def test_nucleus_breaks_ties_by_token_id():
    tied = torch.zeros(1, 5)
    np.testing.assert_allclose(probabilities(tied, top_p=0.5), [[0.5, 0.5, 0, 0, 0]], atol=1e-7)


def test_top_k_keeps_k_tokens_and_the_nucleus_applies_to_what_they_leave():
    logits = logits_of(0.25, 0.45, 0.15, 1.0, 0.15)
    np.testing.assert_allclose(probabilities(logits, top_k=2), [[0.25 / 0.7, 0.45 / 0.7, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(probabilities(logits, top_k=1), [[0, 1, 0, 0, 0]])
    # 0.45 is 0.64 of what top-k leaves, so p = 0.6 keeps it alone; of all it is 0.45 and would not.
    np.testing.assert_allclose(probabilities(logits, top_k=2, top_p=0.6), [[0, 1, 0, 0, 0]])
    np.testing.assert_allclose(probabilities(logits, top_k=99)[0, 3], 0)


def test_draws_follow_the_exact_distribution_with_rare_tokens():
    """65 tokens whose probabilities span six decades, 400,000 draws; rare ones are pooled to 5 expected."""
    generator = np.random.default_rng(0)
    logits_V = generator.uniform(-14, 0, size=65).astype(np.float32)
    draws = 400_000
    uniforms_Q = torch.from_numpy(generator.random(draws))
    weights_1V = TokenRules((MASK,))(torch.from_numpy(logits_V)[None])
    counts_V = np.zeros(65)
    for part in uniforms_Q.split(50_000):
        counts_V += np.bincount(inverse_cdf(weights_1V.expand(len(part), -1), part).numpy(), minlength=65)
    exact_V = np.exp(logits_V.astype(np.float64))
    exact_V[MASK] = 0
    shares_V = exact_V / exact_V.sum()
    assert (draws * shares_V < 5).sum() > 3
    assert p_value(counts_V, shares_V) > 1e-4


def test_no_token_is_too_rare():
    """A token of 1e-12 owns an interval of uniforms that long, wherever it lies; float32 noise misses it."""
    logits = logits_of(0.5, 1e-12, 0.5, 1.0)
    weights_QV = TokenRules((MASK,))(logits)

    def token(uniform: float) -> int:
        return int(inverse_cdf(weights_QV, torch.tensor([uniform], dtype=torch.float64)))

    assert token(0.5 - 0.6e-12) == 0
    assert token(0.5) == 1
    assert token(0.5 + 0.6e-12) == 2


def test_extreme_uniforms_draw_possible_tokens():
    weights_QV = torch.tensor([[0.0, 0.3, 0.0, 0.1, 0.0]], dtype=torch.float64)
    assert int(inverse_cdf(weights_QV, torch.zeros(1, dtype=torch.float64))) == 1
    assert int(inverse_cdf(weights_QV, torch.tensor([1 - 2.0**-53], dtype=torch.float64))) == 3


def test_readout_draws_the_selected_rows_in_chunks():
    torch.manual_seed(0)
    linear = VocabularyLinear(8, 5)
    hidden_BLH = torch.randn(30, 20, 8)
    rows_Q = torch.randperm(600)[:550]  # more than two chunks
    uniforms_Q = torch.rand(550, dtype=torch.float64)
    with torch.inference_mode():
        drawn = TokenDraw(TokenRules((MASK,)), uniforms_Q, rows_Q)(hidden_BLH, linear)
        weights_QV = TokenRules((MASK,))(linear(hidden_BLH.view(-1, 8)[rows_Q]))
        assert torch.equal(drawn, inverse_cdf(weights_QV, uniforms_Q))
        none = TokenDraw(TokenRules((MASK,)), uniforms_Q[:0], rows_Q[:0])(hidden_BLH, linear)
    assert none.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "weights",
    [
        TokenRules((MASK,)),
        TokenRules((MASK,), top_k=2, top_p=0.9),
        AnalyticWeights(TokenRules((MASK,)), 1.0, 0.5),
    ],
)
def test_logits_that_are_not_finite_give_the_mask(weights, bad):
    """And only in their own row; a caller sees the mask once the sequences are finished."""
    logits = torch.tensor(
        [[0.0, bad, 0.0, 0.0], [0.0, -torch.inf, -torch.inf, 0.0], [-torch.inf] * 3 + [0.0]]
    )
    uniforms_Q = torch.full((3,), 0.1, dtype=torch.float64)
    identity: Any = torch.nn.Identity()
    drawn_Q = TokenDraw(weights, uniforms_Q)(logits, identity)
    assert drawn_Q.tolist() == [MASK, 0, MASK]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": 0.0}, "top_k=1"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_impossible_rules_are_refused(values, named):
    with pytest.raises(UserError, match=named):
        TokenRules.of(SamplerConfig(**values), (MASK,))
