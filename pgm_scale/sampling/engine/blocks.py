"""The blocks of `models.blocks` with everything folded that sampling keeps constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pgm_scale.models.blocks import Attend, CrossAttentionBlock, SelfAttentionBlock, modulation
from pgm_scale.sampling.engine.folding import FixedMLP, FixedNorm, behind_norm, gated_linear
from pgm_scale.sampling.engine.layouts import Layout
from pgm_scale.sampling.engine.linear import fixed_linear
from pgm_scale.sampling.engine.rotary import Rotation
from pgm_scale.sampling.engine.values import Values


class FixedSelfAttention:
    """`SelfAttentionBlock` under a constant condition."""

    def __init__(self, block: SelfAttentionBlock, condition: Tensor | None, rotation: Rotation):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block.adaLN_modulation, condition, 6)
        linears: Any = block
        q_weight, k_weight, v_weight = linears.attn_qkv.weight.chunk(3)
        self.num_heads, self.rotation = block.local_heads, rotation
        self.norm = FixedNorm(block.norm1, shift1, scale1)
        self.qkv = fixed_linear(
            torch.cat([rotation.order_rows(q_weight), rotation.order_rows(k_weight), v_weight])
        )
        self.attn_out = gated_linear(linears.attn_out, gate1)
        self.mlp = FixedMLP(FixedNorm(block.norm2, shift2, scale2), block.mlp, gate2)

    def __call__(self, x_TH: Tensor, factors_T: Tensor, attend: Attend) -> Tensor:
        return self.finish(x_TH, attend(*self.project(x_TH, factors_T)))

    def project(self, x_TH: Tensor, factors_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v, each `[T, N, D]`."""
        qkv_T3ND = self.qkv(self.norm(x_TH)).unflatten(-1, (3, self.num_heads, -1))
        q_TND, k_TND = self.rotation.rotate_(qkv_T3ND[:, :2], factors_T[:, None]).unbind(1)
        return q_TND, k_TND, qkv_T3ND[:, 2]

    def finish(self, x_TH: Tensor, attended_TND: Tensor) -> Tensor:
        """The block's output, from its input and what its attention read."""
        return self.mlp(self.attn_out.plus(x_TH, attended_TND.flatten(-2)))


class FixedCrossAttention:
    """`CrossAttentionBlock` under a constant condition; its keys are made outside, for all blocks at once.

    Attributes:
        key_weight: `[H, H]`, from what `__call__` gets as x_TH to rotatable keys.
    """

    def __init__(
        self,
        block: CrossAttentionBlock | SelfAttentionBlock,
        query_norm: FixedNorm,
        qkv_weights: tuple[Tensor, Tensor, Tensor],
        gates: tuple[Tensor | None, Tensor | None],
        mlp_norm: FixedNorm,
        rotation: Rotation,
    ):
        linears: Any = block
        q_weight, k_weight, v_weight = qkv_weights
        self.num_heads, self.rotation = block.local_heads, rotation
        self.norm = query_norm
        self.query = fixed_linear(rotation.order_rows(q_weight))
        self.key_weight = rotation.order_rows(k_weight)
        self.values = Values(v_weight, None, block.local_heads)
        self.attn_out = gated_linear(linears.attn_out, gates[0])
        self.mlp = FixedMLP(mlp_norm, block.mlp, gates[1])

    @classmethod
    def of(cls, block: CrossAttentionBlock, condition: Tensor, rotation: Rotation) -> FixedCrossAttention:
        """Keys and values come from the encoder's normed output, without the weight of this block's norm."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block.adaLN_modulation, condition, 6)
        linears: Any = block
        k_weight, v_weight = (
            behind_norm(weight, block.kv_norm1) for weight in linears.attn_kv.weight.chunk(2)
        )
        return cls(
            block,
            FixedNorm(block.q_norm1, shift1, scale1),
            (linears.attn_q.weight, k_weight, v_weight),
            (gate1, gate2),
            FixedNorm(block.norm2, shift2, scale2),
            rotation,
        )

    @classmethod
    def of_last(cls, block: SelfAttentionBlock, condition: Tensor, rotation: Rotation) -> FixedCrossAttention:
        """A model's last self-attention block, of which only some tokens' outputs are asked for.

        Keys and values come from `norm` of all tokens.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block.adaLN_modulation, condition, 6)
        linears: Any = block
        return cls(
            block,
            FixedNorm(block.norm1, shift1, scale1),
            linears.attn_qkv.weight.chunk(3),
            (gate1, gate2),
            FixedNorm(block.norm2, shift2, scale2),
            rotation,
        )

    def __call__(
        self, y_QH: Tensor, query_factors_Q: Tensor, k_TND: Tensor, x_TH: Tensor, layout: Layout
    ) -> Tensor:
        q_QND = self.query(self.norm(y_QH)).unflatten(-1, (self.num_heads, -1))
        q_QND = self.rotation.rotate_(q_QND, query_factors_Q)
        attended_QND = layout.read(q_QND, k_TND, x_TH, self.values)
        return self.mlp(self.attn_out.plus(y_QH, attended_QND.flatten(-2)))
