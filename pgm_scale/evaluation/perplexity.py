"""Perplexity as a ratio of sums over sequences, with a standard error, mergeable over ranks (FACTS 3.7)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pgm_scale.data.batch import TokenBatch


@dataclass(frozen=True)
class Perplexity:
    """exp(sum of NLL / number of tokens).

    Attributes:
        nll_nats_per_token: the ratio inside the exponential; for diffusion objectives an upper bound, and for
            one that is no likelihood (`Objective.is_likelihood`) its mean loss, without a perplexity.
        standard_error: of that ratio, from its spread over sequences; NaN for fewer than two of them. It
            covers the choice of sequences and the draws; stratified times make the true one a little smaller.
        tokens: scored tokens.
        sequences: sequences with at least one of them.
    """

    nll_nats_per_token: float
    standard_error: float
    tokens: int
    sequences: int

    @property
    def perplexity(self) -> float:
        return math.inf if self.nll_nats_per_token > 700 else math.exp(self.nll_nats_per_token)

    @property
    def perplexity_standard_error(self) -> float:
        """Delta method: the derivative of exp is the perplexity itself."""
        return self.perplexity * self.standard_error


class PerplexityAccumulator:
    """Sums over sequences of their NLL y and token count x; `state` is a vector that ranks add up."""

    def __init__(self) -> None:
        # sequences, sum x, sum y, sum x^2, sum x y, sum y^2
        self._sums = np.zeros(6)

    def add(self, nll_nats_B: np.ndarray, tokens_B: np.ndarray) -> None:
        """Add sequences by their NLL sums and token counts; one without tokens is left out."""
        kept = tokens_B > 0
        x, y = tokens_B[kept].astype(np.float64), nll_nats_B[kept]
        self._sums += [len(x), x.sum(), y.sum(), x @ x, x @ y, y @ y]

    def state(self) -> np.ndarray:
        """float64 [6]; the sum of the ranks' states is the state of the whole."""
        return self._sums.copy()

    def merge(self, state: np.ndarray) -> None:
        """Add another accumulator's state to this one."""
        self._sums += state

    def result(self) -> Perplexity:
        """The ratio estimate R = sum y / sum x, with variance n/(n-1) sum (y - R x)^2 / (sum x)^2."""
        n, x, y, xx, xy, yy = (float(value) for value in self._sums)
        if x == 0:
            return Perplexity(math.nan, math.nan, 0, 0)
        ratio = y / x
        residual_squares = max(yy - 2 * ratio * xy + ratio * ratio * xx, 0.0)
        error = math.sqrt(n / (n - 1) * residual_squares) / x if n > 1 else math.nan
        return Perplexity(ratio, error, round(x), round(n))


def unigram_perplexity(train_counts_V: np.ndarray, batches: Iterable[TokenBatch], mask_id: int) -> Perplexity:
    """Perplexity of the token frequencies of the training split: what a model that ignores context reaches.

    Add-one smoothing over the vocabulary without the mask, p(v) = (count(v) + 1) / (sum of counts + V - 1),
    so that a token never seen in training has a finite NLL. Valid tokens other than the mask id are scored,
    at all positions, as the objectives do.
    """
    smoothed_V = np.asarray(train_counts_V, np.float64) + 1
    smoothed_V[mask_id] = 0
    with np.errstate(divide="ignore"):
        nll_V = np.log(smoothed_V.sum()) - np.log(smoothed_V)
    accumulator = PerplexityAccumulator()
    for batch in batches:
        scored_BL = batch.valid_BL & (batch.tokens_BL != mask_id)
        nll_BL = np.where(scored_BL, nll_V[batch.tokens_BL], 0.0)
        accumulator.add(nll_BL.sum(axis=1), scored_BL.sum(axis=1))
    return accumulator.result()
