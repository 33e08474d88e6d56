"""The Inception score: how sure a classifier is of each image, and how many classes it sees (FACTS 7)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPLITS = 10


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over the splits of exp(mean KL(p(y|x) || p(y)))."""

    mean: float
    standard_deviation: float


def softmax(logits_BK: np.ndarray) -> np.ndarray:
    """float64 probabilities."""
    weights_BK = np.exp(logits_BK.astype(np.float64) - logits_BK.max(axis=1, keepdims=True))
    return weights_BK / weights_BK.sum(axis=1, keepdims=True)


def inception_score(probabilities_BK: np.ndarray, splits: int = SPLITS) -> InceptionScore:
    """The score of p(y|x), over `splits` parts of one fixed random order. At least `splits` images."""
    assert len(probabilities_BK) >= splits, len(probabilities_BK)
    order_B = np.random.default_rng(0).permutation(len(probabilities_BK))
    scores = [_score(probabilities_BK[part_b]) for part_b in np.array_split(order_B, splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(probabilities_bK: np.ndarray) -> float:
    marginal_K = probabilities_bK.mean(axis=0)
    # 0 log 0 is 0: a probability of 0 has no logarithm, and no part in the sum.
    ratios_bK = np.divide(
        probabilities_bK, marginal_K, out=np.ones_like(probabilities_bK), where=probabilities_bK > 0
    )
    return float(np.exp((probabilities_bK * np.log(ratios_bK)).sum(axis=1).mean()))
