import numpy as np
import torch

from pgm_scale.evaluation import TimeBuckets
from pgm_scale.objectives import LossTerms


def terms_of(nats: list[float], tokens: list[int], fractions: list[float]) -> LossTerms:
    nats_S = torch.tensor(nats)
    return LossTerms(nats_S, nats_S, np.array(tokens), np.array(fractions), np.arange(len(nats)))


FIRST = terms_of([10.0, 6.0, 0.0], [5, 2, 0], [0.05, 1.0, 0.0])
SECOND = terms_of([8.0, 3.0], [4, 4], [0.95, 0.5])


def test_means_by_share_of_masked_tokens():
    buckets = TimeBuckets()
    buckets.add(FIRST)
    buckets.add(SECOND)
    expected = np.full(10, np.nan)
    expected[[0, 5, 9]] = [2.0, 0.75, 14 / 6]
    np.testing.assert_allclose(buckets.result(), expected)


def test_merged_states_equal_the_whole():
    whole, merged = TimeBuckets(), TimeBuckets()
    for terms in (FIRST, SECOND):
        whole.add(terms)
        rank = TimeBuckets()
        rank.add(terms)
        merged.merge(rank.state())
    np.testing.assert_array_equal(merged.state(), whole.state())
    np.testing.assert_array_equal(merged.result(), whole.result())
