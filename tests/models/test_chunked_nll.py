"""The chunked NLL against torch's cross-entropy over all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgm_scale.models import chunking
from pgm_scale.models.chunked_nll import chunked_nll
from pgm_scale.models.chunking import VocabularyRange

TOKENS, HIDDEN, VOCAB = 13, 6, 17
EXCLUDED = 4
Arguments = tuple[Tensor, Tensor, Tensor]  # hidden states, weight, bias


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_CPU_CHUNK_LOGITS", 5 * VOCAB)  # 13 rows: 5, 5 and 3


def draw() -> tuple[Arguments, Tensor, Tensor]:
    """The arguments; targets; loss weights, some of them 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    arguments = normal(TOKENS, HIDDEN), normal(VOCAB, HIDDEN), normal(VOCAB)
    targets_T = torch.randint(5, VOCAB, (TOKENS,), generator=generator)
    weights_T = torch.rand(TOKENS, generator=generator) - 0.3
    weights_T[::4] = 0.0
    return arguments, targets_T, weights_T


def oracle(arguments: Arguments, targets_T: Tensor, excluded_id: int | None) -> Tensor:
    hidden_TH, weight_VH, bias_V = arguments
    logits_TV = hidden_TH @ weight_VH.T + bias_V
    if excluded_id is not None:
        logits_TV = logits_TV.index_fill(1, torch.tensor([excluded_id]), -torch.inf)
    return -logits_TV.log_softmax(-1)[torch.arange(TOKENS), targets_T]


def gradients(nll_T: Tensor, weights_T: Tensor, arguments: Arguments) -> tuple[Tensor, ...]:
    return torch.autograd.grad(0.37 * (weights_T * nll_T).sum(), arguments)


@pytest.mark.parametrize("excluded_id", [None, EXCLUDED])
@pytest.mark.parametrize("knows_weights", [True, False])
def test_values_and_gradients_are_those_of_all_logits(excluded_id: int | None, knows_weights: bool) -> None:
    arguments, targets_T, weights_T = draw()
    given = weights_T if knows_weights else None
    nll_T = chunked_nll(*arguments, targets_T, excluded_id, given, VocabularyRange(VOCAB))
    expected_T = oracle(arguments, targets_T, excluded_id)
    torch.testing.assert_close(nll_T.double(), expected_T, rtol=1e-6, atol=1e-6)
    for actual, expected in zip(
        gradients(nll_T, weights_T, arguments), gradients(expected_T, weights_T, arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_an_excluded_target_is_infinitely_unlikely() -> None:
    arguments, targets_T, _ = draw()
    nll_T = chunked_nll(*arguments, targets_T.fill_(EXCLUDED), EXCLUDED, None, VocabularyRange(VOCAB))
    assert (nll_T == torch.inf).all()


def test_rows_beyond_the_vocabulary_are_padding() -> None:
    arguments, _, weights_T = draw()
    targets_T = torch.arange(TOKENS) % 11
    nll_T = chunked_nll(*arguments, targets_T, None, weights_T, VocabularyRange(11))
    cut = arguments[0], arguments[1][:11], arguments[2][:11]
    torch.testing.assert_close(nll_T.double(), oracle(cut, targets_T, None), rtol=1e-6, atol=1e-6)
    assert (gradients(nll_T, weights_T, arguments)[1][11:] == 0).all()


def test_a_loss_that_is_not_the_weighted_sum_is_refused() -> None:
    arguments, targets_T, weights_T = draw()
    nll_T = chunked_nll(*arguments, targets_T, None, weights_T, VocabularyRange(VOCAB))
    with pytest.raises(RuntimeError, match="not a multiple"):
        nll_T.sum().backward()


def test_nothing_counts() -> None:
    arguments, targets_T, weights_T = draw()
    nothing_T = torch.zeros_like(weights_T)
    nll_T = chunked_nll(*arguments, targets_T, None, nothing_T, VocabularyRange(VOCAB))
    assert all((gradient == 0).all() for gradient in gradients(nll_T, nothing_T, arguments))


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, targets_T, weights_T = draw()
    monkeypatch.setattr(chunking._ChunkedLosses, "apply", None)
    with torch.no_grad():
        nll_T = chunked_nll(*arguments, targets_T, None, weights_T, VocabularyRange(VOCAB))
    torch.testing.assert_close(nll_T.double(), oracle(arguments, targets_T, None), rtol=1e-6, atol=1e-6)
