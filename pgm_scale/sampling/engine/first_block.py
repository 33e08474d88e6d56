"""The first block's attention over a growing set of tokens, kept from step to step.

There the queries, keys and values of a token depend on the token and its position alone, so they are computed when
it is decoded. What a query has read is kept with the logarithm of its softmax's denominator: reading m more keys is
a weighted mean of the old result and theirs. A step then costs m * n scores instead of n * n. Everything is fp32,
because a run adds up hundreds of such means.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GrowingAttention:
    """Self-attention of tokens that arrive in groups; memory for all of them is taken at once.

    Args:
        size_BLND: sequences, tokens at the end, heads, head size.
    """

    def __init__(self, size_BLND: tuple[int, int, int, int], device: torch.device):
        sequences, length, self.num_heads, head_size = size_BLND
        shape = (sequences * self.num_heads, length, head_size)
        self.sequences = sequences
        self.q, self.k, self.v, self.read = (torch.zeros(shape, device=device) for _ in range(4))
        self.log_sums = torch.empty(*shape[:2], 1, device=device)

    def add(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, start: int) -> None:
        """Every token reads the m new ones, and they read all; there were `start` of each sequence before."""
        end = start + q_TND.shape[0] // self.sequences
        new = slice(start, end)
        for kept, x_TND in ((self.q, q_TND), (self.k, k_TND), (self.v, v_TND)):
            kept[:, new] = x_TND.unflatten(0, (self.sequences, -1)).transpose(1, 2).flatten(0, 1)
        self.q[:, new] *= self.q.shape[-1] ** -0.5
        if start:
            self._read_more(slice(0, start), new)
        scores = torch.bmm(self.q[:, new], self.k[:, :end].transpose(1, 2))
        self.log_sums[:, new] = log_sums = scores.logsumexp(dim=-1, keepdim=True)
        self.read[:, new] = torch.bmm((scores - log_sums).exp_(), self.v[:, :end])

    def results(self, tokens: int) -> Tensor:
        """fp32 `[B * tokens, N, D]`: what the first tokens of each sequence read; any number if not added yet."""
        read_BNnD = self.read[:, :tokens].unflatten(0, (self.sequences, self.num_heads))
        return read_BNnD.transpose(1, 2).flatten(0, 1)

    def _read_more(self, old: slice, new: slice) -> None:
        scores = torch.bmm(self.q[:, old], self.k[:, new].transpose(1, 2))
        before = self.log_sums[:, old].clone()
        after = torch.logaddexp(before, scores.logsumexp(dim=-1, keepdim=True))
        self.read[:, old] *= (before - after).exp_()
        self.read[:, old] += torch.bmm((scores - after).exp_(), self.v[:, new])
        self.log_sums[:, old] = after
