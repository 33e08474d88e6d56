"""Attention that projects to values what it has averaged, not what it reads.

With weights a that sum to 1, sum_t a_t (W x_t + b) = W (sum_t a_t x_t) + b. A sampling step asks few queries about
many tokens, so the right side is cheaper by far: per token that is read, H * N * m multiplications for m queries
of N heads instead of H * H (for 8 queries, 4 heads and H = 256, an eighth; 6% of a PGM sampling run).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgm_scale.sampling.engine.linear import fixed_linear


class Values:
    """The value projection of one attention, for either side of the equation.

    Args:
        weight: `[N * D, H]`.
        bias: `[N * D]` or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, num_heads: int):
        self.num_heads = num_heads
        self.linear = fixed_linear(weight, bias)
        self.weight_NHD = weight.detach().unflatten(0, (num_heads, -1)).transpose(1, 2).contiguous()
        self.bias_ND = None if bias is None else bias.detach().unflatten(0, (num_heads, -1))

    def of_tokens(self, x_TH: Tensor) -> Tensor:
        """`[T, N, D]`."""
        return self.linear(x_TH).unflatten(-1, (self.num_heads, -1))

    def of_averages(self, x_NQH: Tensor) -> Tensor:
        """`[Q, N, D]` of one average per head and query."""
        v_QND = torch.bmm(x_NQH, self.weight_NHD).transpose(0, 1)
        return v_QND if self.bias_ND is None else v_QND + self.bias_ND


def few_queries(queries: int, num_heads: int, hidden_size: int) -> bool:
    """Whether averaging first takes fewer operations, for so many queries of one sequence."""
    return queries * (num_heads - 1) < hidden_size


def attend_averaging(
    q_BmND: Tensor, k_BnND: Tensor, x_BnH: Tensor, values: Values, unread_Bn: Tensor | None = None
) -> Tensor:
    """`[B * m, N, D]`: what m queries a sequence read in its n > 0 tokens x, which have keys k.

    Tokens that are `unread_Bn`, a bool, are padding; not all of a sequence are.

    All heads and queries of a sequence are the rows of one matrix, each zero outside its own head: the N-fold
    products are as few as those of the averages, and no key is copied.
    """
    sequences, queries, num_heads, head_size = q_BmND.shape
    rows = q_BmND.new_zeros(sequences, num_heads, queries, num_heads, head_size)
    rows.diagonal(dim1=1, dim2=3).copy_(q_BmND.transpose(-1, -2) * head_size**-0.5)
    scores = torch.bmm(rows.flatten(-2).flatten(1, 2), k_BnND.flatten(-2).transpose(1, 2))
    if unread_Bn is not None:
        scores.masked_fill_(unread_Bn[:, None], -torch.inf)
    averages = torch.bmm(scores.softmax(dim=-1), x_BnH).unflatten(1, (num_heads, queries))
    return values.of_averages(averages.transpose(0, 1).flatten(1, 2))
