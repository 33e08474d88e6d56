import math

import numpy as np
import pytest

from pgm_scale.data import TokenBatch
from pgm_scale.evaluation import PerplexityAccumulator, unigram_perplexity

generator = np.random.default_rng(0)
TOKENS_B = generator.integers(20, 60, 200)
NLL_B = TOKENS_B * generator.normal(3.0, 0.4, 200)


def accumulated(nll_B: np.ndarray, tokens_B: np.ndarray) -> PerplexityAccumulator:
    accumulator = PerplexityAccumulator()
    accumulator.add(nll_B, tokens_B)
    return accumulator


def test_ratio_and_its_standard_error():
    result = accumulated(NLL_B, TOKENS_B).result()
    ratio = NLL_B.sum() / TOKENS_B.sum()
    assert result.nll_nats_per_token == pytest.approx(ratio)
    assert result.perplexity == pytest.approx(math.exp(ratio))
    assert (result.tokens, result.sequences) == (TOKENS_B.sum(), 200)
    residuals = NLL_B - ratio * TOKENS_B
    error = np.sqrt((residuals**2).sum() / 199 * 200) / TOKENS_B.sum()
    assert result.standard_error == pytest.approx(error, rel=1e-9)
    assert result.perplexity_standard_error == pytest.approx(math.exp(ratio) * error, rel=1e-9)


def test_standard_error_is_that_of_new_samples():
    """The spread of the estimate over many sets of 50 sequences is what one set says it is."""
    fresh = np.random.default_rng(1)
    estimates, errors = [], []
    for _ in range(400):
        tokens_B = fresh.integers(20, 60, 50)
        result = accumulated(tokens_B * fresh.normal(3.0, 0.4, 50), tokens_B).result()
        estimates.append(result.perplexity)
        errors.append(result.perplexity_standard_error)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.12)


def test_merged_states_equal_the_whole():
    whole = accumulated(NLL_B, TOKENS_B).result()
    merged = PerplexityAccumulator()
    for rows in (slice(0, 70), slice(70, 200)):
        merged.merge(accumulated(NLL_B[rows], TOKENS_B[rows]).state())
    assert merged.result().standard_error == pytest.approx(whole.standard_error, rel=1e-9)
    assert merged.result().nll_nats_per_token == pytest.approx(whole.nll_nats_per_token)


def test_sequences_without_scored_tokens_are_left_out():
    padded = accumulated(np.append(NLL_B, [0.0, 0.0]), np.append(TOKENS_B, [0, 0])).result()
    assert padded == accumulated(NLL_B, TOKENS_B).result()


def test_nothing_and_one_sequence_have_no_standard_error():
    empty = PerplexityAccumulator().result()
    assert math.isnan(empty.perplexity)
    one = accumulated(np.array([6.0]), np.array([2])).result()
    assert one.perplexity == pytest.approx(math.exp(3))
    assert math.isnan(one.standard_error)


def test_a_diverged_model_has_infinite_perplexity():
    assert accumulated(np.array([9e4, 9e4]), np.array([10, 10])).result().perplexity == math.inf


def test_unigram_perplexity_by_hand():
    mask_id = 1
    counts_V = np.array([3, 100, 0, 1])  # the mask's own count is ignored
    tokens_BL = np.array([[0, 0, 2], [3, 1, 0]])
    valid_BL = np.array([[True, True, True], [True, True, False]])
    batches = [TokenBatch(tokens_BL[b : b + 1], valid_BL[b : b + 1], np.array([b])) for b in (0, 1)]
    result = unigram_perplexity(counts_V, batches, mask_id)
    p = {0: 4 / 7, 2: 1 / 7, 3: 2 / 7}
    expected = -(2 * math.log(p[0]) + math.log(p[2]) + math.log(p[3])) / 4
    assert result.nll_nats_per_token == pytest.approx(expected)
    assert (result.tokens, result.sequences) == (4, 2)
