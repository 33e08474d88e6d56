"""What is logged of a codebook: the share of codes in use, and the perplexity of their histogram."""

import numpy as np
import pytest
import torch

from pgm_scale.objectives.base import LossTerms
from pgm_scale.training.codebook_usage import CodebookUsage, usage_metrics


def _terms(counts: list[int] | None) -> LossTerms:
    nothing = np.zeros(0)
    return LossTerms(
        torch.zeros(0), None, nothing, nothing, nothing, None if counts is None else torch.tensor(counts)
    )


def test_histograms_add_up_over_batches_and_ranks() -> None:
    ranks = CodebookUsage(), CodebookUsage()
    ranks[0].add(_terms([3, 0, 0, 0]))
    ranks[0].add(_terms([0, 1, 0, 0]))
    ranks[1].add(_terms([0, 4, 0, 0]))
    state = ranks[0].state() + ranks[1].state()
    assert state.tolist() == [3, 5, 0, 0]
    found = usage_metrics(state)
    assert found["codebook_usage"] == 0.5
    assert found["codebook_perplexity"] == pytest.approx((3 / 8) ** (-3 / 8) * (5 / 8) ** (-5 / 8))


def test_perplexity_counts_equally_frequent_codes() -> None:
    assert usage_metrics(np.full(64, 7.0)) == {
        "codebook_usage": 1.0,
        "codebook_perplexity": pytest.approx(64),
    }
    assert usage_metrics(np.array([0.0, 9.0])) == {"codebook_usage": 0.5, "codebook_perplexity": 1.0}


def test_objectives_without_codes_log_nothing() -> None:
    usage = CodebookUsage()
    usage.add(_terms(None))
    assert len(usage.state()) == 0
    assert usage_metrics(usage.state()) == {}
