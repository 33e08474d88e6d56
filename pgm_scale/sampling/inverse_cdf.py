"""The exact draw from one float64 uniform, without a float64 copy of [Q, V].

Tokens are cut into blocks. Block sums are added up in float64, the uniform picks a block, and inside it a token,
by cumulative sums in float64: two small searches instead of float64 passes over the vocabulary.

Why it is exact. Let w_j >= 0 be the weights as they are given (fp32 softmax, relative error about 1e-6, which is
what the rounding of a logit of 10 in fp32 does) and S_j = w_1 + ... + w_j. For a uniform u in [0, 1) the plain
inverse CDF draws the first j with S_j > u S_V, so j for an interval of u of length w_j / S_V: its probability.
The block that is picked is the first whose last token has S > u S_V; the token is the first in it with
S_j > u S_V, S_j being the sum before the block and the sum inside it. Together that is the plain rule. Every sum
is a float64 sum of non-negative numbers, so its relative error is below 1e-12 for any vocabulary, and u itself
has steps of 1e-16: a token of probability 1e-12 is drawn as often as it should be. The search passes over tokens
of weight 0, because their S_j does not grow; thresholds are kept below the totals, so it cannot run past the last
token that has a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_TOKENS = 256


def inverse_cdf(weights_QV: Tensor, uniforms_Q: Tensor) -> Tensor:
    """Token ids int64 [Q]: the first token whose cumulative weight exceeds uniform * total.

    Args:
        weights_QV: float32 or float64, not negative. A row without a positive or with a NaN weight gives any token.
        uniforms_Q: float64 in [0, 1).
    """
    vocab_size = weights_QV.shape[-1]
    whole = vocab_size - vocab_size % BLOCK_TOKENS
    blocks_QBb = weights_QV[:, :whole].unflatten(-1, (-1, BLOCK_TOKENS))
    last_Q1 = weights_QV[:, whole:].sum(dim=-1, keepdim=True, dtype=torch.float64)
    block_ends_QB = torch.cat([blocks_QBb.sum(dim=-1, dtype=torch.float64), last_Q1], dim=-1).cumsum(dim=-1)
    threshold_Q1 = _below(uniforms_Q[:, None] * block_ends_QB[:, -1:], block_ends_QB[:, -1:])
    block_Q1 = _first_above(block_ends_QB, threshold_Q1)
    before_Q1 = torch.where(block_Q1 > 0, block_ends_QB.gather(1, (block_Q1 - 1).clamp(min=0)), 0.0)

    tokens_Qb = block_Q1 * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=weights_QV.device)
    inside_Qb = weights_QV.gather(1, tokens_Qb.clamp(max=vocab_size - 1)).double()
    ends_Qb = inside_Qb.masked_fill_(tokens_Qb >= vocab_size, 0.0).cumsum(dim=-1)
    inside_Q1 = _first_above(ends_Qb, _below(threshold_Q1 - before_Q1, ends_Qb[:, -1:]))
    return tokens_Qb.gather(1, inside_Q1)[:, 0].clamp_(max=vocab_size - 1)


def _first_above(ends_QK: Tensor, threshold_Q1: Tensor) -> Tensor:
    """int64 [Q, 1]: the first entry above the threshold; the last one if none is (NaNs)."""
    return torch.searchsorted(ends_QK, threshold_Q1, right=True).clamp_(max=ends_QK.shape[-1] - 1)


def _below(threshold_Q1: Tensor, total_Q1: Tensor) -> Tensor:
    """The threshold, if rounding has taken it to the total, just below: else no entry would be above it."""
    return torch.minimum(threshold_Q1, torch.nextafter(total_Q1, torch.zeros_like(total_Q1)))
