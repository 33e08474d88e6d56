"""Transformer blocks and the output layer, over packed tokens `[T, H]`.

A block is told how to attend by a function of rotated q, k and v, so one block serves the Partition
Transformer's encoder, MDLM's transformer and the autoregressive one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pgm_scale.models.dropout import dropout
from pgm_scale.models.host_matmul import HostLinear, fuses_gelu
from pgm_scale.models.layers import LayerBuilder, LayerNorm, gated_residual, rotate, zero_linear
from pgm_scale.models.readout import Readout

Rotary = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v, each [..., N, D] -> [..., N, D]
MLP_RATIO = 4


class FeedForward(nn.Sequential):
    """Linear, GELU in its tanh form, linear."""

    def __init__(self, hidden_size: int, layers: LayerBuilder):
        super().__init__(
            layers.column_linear(hidden_size, MLP_RATIO * hidden_size, bias=True),
            nn.GELU(approximate="tanh"),
            layers.row_linear(MLP_RATIO * hidden_size, hidden_size, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        expand, gelu, contract = self
        if isinstance(expand, HostLinear) and fuses_gelu(x):
            return contract(expand(x, True))
        return contract(gelu(expand(x)))


def split_heads(fused: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """`[..., parts * N * D]`, part-major then head-major, to `parts` tensors `[..., N, D]`."""
    return fused.unflatten(-1, (parts, num_heads, fused.shape[-1] // (parts * num_heads))).unbind(-3)


class SelfAttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP, each added through an adaLN gate (FACTS 1.2).

    Without a `condition_size` there is no adaLN: plain norms and gates of 1, as the autoregressive model has.
    Dropout falls on both outputs before their gates, drawn from the global torch generator.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        condition_size: int | None,
        layers: LayerBuilder,
    ):
        super().__init__()
        self.local_heads = num_heads // layers.tensor_parallel_size
        self.dropout = dropout
        self.norm1 = LayerNorm(hidden_size)
        self.attn_qkv = layers.column_linear(hidden_size, 3 * hidden_size, bias=False, fused_parts=3)
        self.attn_out = layers.row_linear(hidden_size, hidden_size, bias=False)
        self.norm2 = LayerNorm(hidden_size)
        self.mlp = FeedForward(hidden_size, layers)
        self.adaLN_modulation = (
            None
            if condition_size is None
            else zero_linear(layers.replicated_linear(condition_size, 6 * hidden_size, bias=True))
        )

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, condition: Tensor | None = None) -> Tensor:
        """x `[T, H]`; condition `[c]`, or `[B, 1, c]`, one a sequence of T = B * L tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.adaLN_modulation, condition, 6)
        q, k, v = split_heads(self.attn_qkv(self.norm1(x, shift1, scale1)), 3, self.local_heads)
        attended = attend(rotate(q, rotary), rotate(k, rotary), v).flatten(-2)
        x = gated_residual(x, dropout(self.attn_out(attended), self.dropout, self.training), gate1)
        update = self.mlp(self.norm2(x, shift2, scale2))
        return gated_residual(x, dropout(update, self.dropout, self.training), gate2)


class CrossAttentionBlock(nn.Module):
    """Decoder block: the query stream reads the encoder's output, never itself (FACTS 1.2).

    adaLN shifts and scales only the query side; keys and values come from a plain norm of the encoder output.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, dropout: float, condition_size: int, layers: LayerBuilder
    ):
        super().__init__()
        self.local_heads = num_heads // layers.tensor_parallel_size
        self.dropout = dropout
        self.q_norm1 = LayerNorm(hidden_size)
        self.kv_norm1 = LayerNorm(hidden_size)
        self.norm2 = LayerNorm(hidden_size)
        self.attn_q = layers.column_linear(hidden_size, hidden_size, bias=False)
        self.attn_kv = layers.column_linear(hidden_size, 2 * hidden_size, bias=False, fused_parts=2)
        self.attn_out = layers.row_linear(hidden_size, hidden_size, bias=False)
        self.mlp = FeedForward(hidden_size, layers)
        self.adaLN_modulation = zero_linear(
            layers.replicated_linear(condition_size, 6 * hidden_size, bias=True)
        )

    def forward(
        self,
        x_QH: Tensor,
        encoded_TH: Tensor,
        query_rotary: Rotary,
        key_rotary: Rotary,
        attend: Attend,
        condition: Tensor,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.adaLN_modulation, condition, 6)
        (q_QND,) = split_heads(self.attn_q(self.q_norm1(x_QH, shift1, scale1)), 1, self.local_heads)
        k_TND, v_TND = split_heads(self.attn_kv(self.kv_norm1(encoded_TH)), 2, self.local_heads)
        attended = attend(rotate(q_QND, query_rotary), rotate(k_TND, key_rotary), v_TND).flatten(-2)
        x_QH = gated_residual(x_QH, dropout(self.attn_out(attended), self.dropout, self.training), gate1)
        update = self.mlp(self.norm2(x_QH, shift2, scale2))
        return gated_residual(x_QH, dropout(update, self.dropout, self.training), gate2)


class OutputLayer(nn.Module):
    """Norm, modulation (with a `condition_size`) and output linear, which starts at 0: all logits are 0."""

    def __init__(self, hidden_size: int, vocab_size: int, condition_size: int | None, layers: LayerBuilder):
        super().__init__()
        self.all_tokens = layers.all_tokens
        self.norm_final = LayerNorm(hidden_size)
        self.linear = zero_linear(layers.vocab_linear(hidden_size, vocab_size))
        self.adaLN_modulation = (
            None
            if condition_size is None
            else zero_linear(layers.replicated_linear(condition_size, 2 * hidden_size, bias=True))
        )

    def forward(
        self, x_TH: Tensor, condition: Tensor | None, readout: Readout, shape: tuple[int, ...] = (-1,)
    ) -> Any:
        """The readout of the normed states, as `[*shape, H]`."""
        shift, scale = modulation(self.adaLN_modulation, condition, 2)
        hidden_TH = self.all_tokens(self.norm_final(x_TH, shift, scale))
        return readout(hidden_TH.unflatten(0, shape), self.linear)


def modulation(linear: nn.Module | None, condition: Tensor | None, parts: int) -> tuple[Tensor | None, ...]:
    """The condition's shifts, scales and gates, or Nones for a block without adaLN."""
    if linear is None:
        return (None,) * parts
    return linear(condition).chunk(parts, dim=-1)
