"""One chi-square test for every sampler's test."""

from __future__ import annotations

import numpy as np
from scipy import stats


def p_value(counts: np.ndarray, shares: np.ndarray) -> float:
    """Chi-square p-value of `counts` against the exact `shares`; cells with fewer than 5 expected are pooled.

    What has a share of 0 must not have been drawn at all.
    """
    assert not counts[shares == 0].any()
    expected = counts.sum() * shares
    few = expected < 5
    observed, expected = (np.append(x[~few], x[few].sum()) for x in (counts, expected))
    possible = expected > 0
    return float(stats.chisquare(observed[possible], expected[possible]).pvalue)
