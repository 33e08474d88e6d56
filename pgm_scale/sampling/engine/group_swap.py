"""GroupSwap for sampling: its queries know only their position, so they are a table by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pgm_scale.models.partition_transformer import GroupSwap
from pgm_scale.sampling.engine.layouts import Layout
from pgm_scale.sampling.engine.linear import fixed_linear
from pgm_scale.sampling.engine.rotary import Rotation
from pgm_scale.sampling.engine.values import Values


class FixedGroupSwap:
    """`GroupSwap`; where its queries hold an aggregate of the encodings too, they are computed at each step."""

    def __init__(self, group_swap: GroupSwap, length: int, rotation: Rotation):
        linears: Any = group_swap
        k_weight, v_weight = linears.hidden_to_key_value.weight.chunk(2)
        k_bias, v_bias = linears.hidden_to_key_value.bias.chunk(2)
        self.plain, self.rotation, self.num_heads = group_swap, rotation, group_swap.local_heads
        self.key = fixed_linear(rotation.order_rows(k_weight), rotation.order_rows(k_bias))
        self.values = Values(v_weight, v_bias, self.num_heads)
        self.output_linear = fixed_linear(linears.output_linear.weight, linears.output_linear.bias)
        base_1H = group_swap.base_embedding
        self.seeds_LH = base_1H.expand(length, -1)
        if group_swap.position_table is not None:
            positions_L = torch.arange(length, device=base_1H.device)
            self.seeds_LH = base_1H + group_swap.position_table(positions_L, base_1H.dtype)
        self.queries_LND = None
        if group_swap.aggregate is None:
            self.queries_LND = self._queries(self.seeds_LH, rotation.table_L[:length])

    def __call__(self, positions_Q: Tensor, encoded_TH: Tensor, factors_T: Tensor, layout: Layout) -> Tensor:
        """The decoder's first stream `[Q, H]`."""
        k_TND = self.key(encoded_TH).unflatten(-1, (self.num_heads, -1))
        k_TND = self.rotation.rotate_(k_TND, factors_T)
        if self.queries_LND is not None:
            q_QND = self.queries_LND[positions_Q]
        else:
            assert self.plain.aggregate is not None
            aggregates_QH = layout.aggregates(self.plain.aggregate, encoded_TH, len(positions_Q))
            seeds_QH = self.seeds_LH[positions_Q] + aggregates_QH.to(self.seeds_LH.dtype)
            q_QND = self._queries(seeds_QH, self.rotation.table_L[positions_Q])
        return self.output_linear(layout.read(q_QND, k_TND, encoded_TH, self.values).flatten(-2))

    def _queries(self, seeds_QH: Tensor, factors_Q: Tensor) -> Tensor:
        processed_QH = self.plain.query_processor(self.plain.pre_query_norm(seeds_QH))
        ordered_QH = self.rotation.order_rows(processed_QH.T).T.contiguous()
        return self.rotation.rotate_(ordered_QH.unflatten(-1, (self.num_heads, -1)), factors_Q)
