"""Who reads whom: all sequences of one size in plain batches, or packed segments of any sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.segments import Segments, segment_attention
from pgm_scale.sampling.engine.values import Values, attend_averaging, few_queries

Aggregate = Callable[[Tensor, Segments], Tensor]  # [T, H] -> [S, H]


class Layout(Protocol):
    """How T tokens and Q queries belong to sequences."""

    def attend(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        """`[T, N, D]`: every token reads its sequence."""

    def read(self, q_QND: Tensor, k_TND: Tensor, x_TH: Tensor, values: Values) -> Tensor:
        """`[Q, N, D]`: every query reads its sequence, whose values are a projection of x."""

    def aggregates(self, aggregate: Aggregate, x_TH: Tensor, queries: int) -> Tensor:
        """`[Q, H]`: for each of the Q queries the aggregate of its sequence."""


@dataclass(frozen=True)
class DenseLayout:
    """Sequences of T / B > 0 tokens and Q / B > 0 queries each; attention makes nothing on the host.

    Attributes:
        sequences: B.
        tokens: only so many first tokens of each sequence are read, the others are padding; None: all.
    """

    sequences: int
    tokens: int | None = None

    def attend(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        q_BNnD = self._batched(q_TND).transpose(1, 2)
        k_BNnD, v_BNnD = (self._read(x_TND).transpose(1, 2) for x_TND in (k_TND, v_TND))
        return F.scaled_dot_product_attention(q_BNnD, k_BNnD, v_BNnD).transpose(1, 2).flatten(0, 1)

    def read(self, q_QND: Tensor, k_TND: Tensor, x_TH: Tensor, values: Values) -> Tensor:
        if few_queries(q_QND.shape[0] // self.sequences, values.num_heads, x_TH.shape[-1]):
            q_BmND, k_BnND, x_BnH = self._batched(q_QND), self._read(k_TND), self._read(x_TH)
            return attend_averaging(q_BmND, k_BnND, x_BnH, values)
        return self.attend(q_QND, k_TND, values.of_tokens(x_TH))

    def aggregates(self, aggregate: Aggregate, x_TH: Tensor, queries: int) -> Tensor:
        x_BnH = self._read(x_TH)
        segments = Segments.of([x_BnH.shape[1]] * self.sequences, x_TH.device)
        return aggregate(x_BnH.flatten(0, 1), segments).repeat_interleave(queries // self.sequences, dim=0)

    def _batched(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.sequences, -1))

    def _read(self, x: Tensor) -> Tensor:
        return self._batched(x)[:, : self.tokens]


@dataclass(frozen=True)
class PackedLayout:
    """Segments of any lengths, empty ones among them: query segment j reads key segment j."""

    key_segments: Segments
    query_segments: Segments

    def attend(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        return segment_attention(q_TND, k_TND, v_TND, self.key_segments, self.key_segments)

    def read(self, q_QND: Tensor, k_TND: Tensor, x_TH: Tensor, values: Values) -> Tensor:
        v_TND = values.of_tokens(x_TH)
        return segment_attention(q_QND, k_TND, v_TND, self.query_segments, self.key_segments)

    def aggregates(self, aggregate: Aggregate, x_TH: Tensor, queries: int) -> Tensor:
        return F.embedding(self.query_segments.ids_T, aggregate(x_TH, self.key_segments))


def layout_of(inputs: PartitionInputs) -> Layout:
    keys, queries = inputs.segments, inputs.query_segments
    if keys.is_uniform and queries.is_uniform:
        return DenseLayout(keys.count)
    return PackedLayout(keys, queries)
