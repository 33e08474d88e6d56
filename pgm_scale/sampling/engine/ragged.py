"""Attention between packed segments of different lengths on any device, with everything else left packed.

`PackedLayout` calls one attention a segment, which is what a few long segments want. A server's batch is many short
ones: 64 rows of 4 to 36 tokens, 4 + 4 blocks of 256, took 73 ms a step, 22 of them in 576 small attentions. Here
queries and keys are gathered into a padded batch for the attention alone, and its output is gathered back, so the
linears see no padding but for the last few tokens that round their number up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgm_scale.models.segments import Segments
from pgm_scale.sampling.engine.layouts import Aggregate
from pgm_scale.sampling.engine.values import Values, attend_averaging, few_queries


def rounded_up(rows: int) -> int:
    """The number of rows that linears get: from 16 on a multiple of 8, and above 256 of a 32nd of a power of two.

    oneDNN compiles a kernel for each new number of rows (1 to 2 ms) and keeps 1,024 of them. A server's batch has
    another number of tokens at each step; rounded up they are few different ones, for little more work.
    """
    if rows <= 16:
        return rows
    unit = max(8, (1 << (rows - 1).bit_length()) // 32)
    return -(-rows // unit) * unit


class PaddedRows:
    """Where the rows of segments, packed one behind another, lie in a padded batch, and back.

    Args:
        lengths: of the segments, above 0.
        packed_rows: at least their sum; what is behind the segments belongs to none.
    """

    def __init__(self, lengths: Sequence[int], packed_rows: int, device: torch.device) -> None:
        lengths_S = np.asarray(lengths, np.int64)
        self.count, self.longest, self.packed_rows = len(lengths_S), int(lengths_S.max()), packed_rows
        self.used_rows = int(lengths_S.sum())
        self.is_full = bool((lengths_S == self.longest).all())
        if self.is_full:
            return
        slots_M = np.arange(self.longest)
        starts_S = np.cumsum(lengths_S) - lengths_S
        held_SM = slots_M < lengths_S[:, None]
        padded_P = np.where(held_SM, starts_S[:, None] + slots_M, 0).reshape(-1)
        packed_T = np.zeros(packed_rows, np.int64)
        packed_T[: self.used_rows] = np.flatnonzero(held_SM)
        self.padded_P, self.packed_T, self.missing_SM = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in (padded_P, packed_T, ~held_SM)
        )

    def pad(self, x: Tensor) -> Tensor:
        """`[S, M, ...]` of packed rows `[T, ...]`; a slot that holds none repeats row 0."""
        rows = x[: self.used_rows] if self.is_full else x.index_select(0, self.padded_P)
        return rows.unflatten(0, (self.count, self.longest))

    def pack(self, x_SM: Tensor) -> Tensor:
        """Packed rows `[T, ...]` of `[S, M, ...]`; those of no segment hold anything finite."""
        rows = x_SM.flatten(0, 1)
        if not self.is_full:
            return rows.index_select(0, self.packed_T)
        behind = self.packed_rows - self.used_rows
        return torch.cat([rows, rows[:1].expand(behind, *rows.shape[1:])]) if behind else rows


class RaggedLayout:
    """A `Layout` of S sequences with any numbers of tokens and of queries, all above 0.

    Args:
        token_counts, query_counts: of each sequence.
        tokens, queries: T and Q, which may be more.
    """

    def __init__(
        self,
        token_counts: Sequence[int],
        query_counts: Sequence[int],
        tokens: int,
        queries: int,
        device: torch.device,
    ) -> None:
        self.tokens = PaddedRows(token_counts, tokens, device)
        self.queries = PaddedRows(query_counts, queries, device)
        self.token_counts, self.query_counts, self.device = token_counts, query_counts, device
        self.unread_SM = None if self.tokens.is_full else self.tokens.missing_SM
        self.read_S11M = None if self.unread_SM is None else ~self.unread_SM[:, None, None]

    def attend(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        return self._attend(self.tokens, q_TND, k_TND, v_TND)

    def read(self, q_QND: Tensor, k_TND: Tensor, x_TH: Tensor, values: Values) -> Tensor:
        if not few_queries(self.queries.longest, values.num_heads, x_TH.shape[-1]):
            return self._attend(self.queries, q_QND, k_TND, values.of_tokens(x_TH))
        q_SmND, k_SnND, x_SnH = self.queries.pad(q_QND), self.tokens.pad(k_TND), self.tokens.pad(x_TH)
        read = attend_averaging(q_SmND, k_SnND, x_SnH, values, self.unread_SM)
        return self.queries.pack(read.unflatten(0, (self.queries.count, -1)))

    def aggregates(self, aggregate: Aggregate, x_TH: Tensor, queries: int) -> Tensor:
        segments = Segments.of(self.token_counts, self.device)
        aggregates_SH = aggregate(x_TH[: self.tokens.used_rows], segments)
        of_queries_SmH = aggregates_SH[:, None].expand(-1, self.queries.longest, -1)
        return self.queries.pack(of_queries_SmH)

    def _attend(self, asking: PaddedRows, q: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        q_SNmD, k_SNnD, v_SNnD = (
            rows.pad(x).transpose(1, 2)
            for rows, x in ((asking, q), (self.tokens, k_TND), (self.tokens, v_TND))
        )
        attended = F.scaled_dot_product_attention(q_SNmD, k_SNnD, v_SNnD, attn_mask=self.read_S11M)
        return asking.pack(attended.transpose(1, 2))
