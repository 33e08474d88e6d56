"""Layers of the published transformers: norm, modulation, rotation, attention and gate each on its own (FACTS 1.2).

Names of parameters are those of the published state dicts (FACTS 1.5), which ours share. Shape suffixes as in
`pgm_scale.models`; here sequences stay `[B, L, H]` and are never packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]  # cosines and sines [B, 1, L, D]
ROPE_BASE = 10000.0


class PublishedModel(nn.Module):
    """A model whose weights can be those of ours."""

    def __init__(self, config: Any, vocab_size: int, length: int) -> None:
        raise NotImplementedError

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], config: Any, length: int) -> Self:
        """The model with a copy of the weights `state`, in training mode; the config's dropout applies."""
        embedding_VH = state["vocab_embed.embedding"]
        model = cls(config, embedding_VH.shape[0], length).to(embedding_VH)
        model.load_state_dict(state)
        return model


class WeightNorm(nn.Module):
    """Layer norm in fp32 without a bias."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape) * self.weight


class TokenEmbedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens]


class ZeroTime(nn.Module):
    """The condition `[1, 1, c]` of noise level 0: features of 128 ones and 128 zeros through the time MLP."""

    def __init__(self, condition_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, condition_size), nn.SiLU(), nn.Linear(condition_size, condition_size)
        )

    def forward(self) -> Tensor:
        weight = next(self.parameters())
        features = torch.cat([weight.new_ones(1, 1, 128), weight.new_zeros(1, 1, 128)], dim=-1)
        return F.silu(self.mlp(features))


class RotaryAngles(nn.Module):
    """Tables of all positions, from which every call gathers its own."""

    cos_LD: Tensor
    sin_LD: Tensor

    def __init__(self, length: int, head_size: int) -> None:
        super().__init__()
        inverse_K = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
        angles_LK = torch.arange(length)[:, None] * inverse_K
        angles_LD = torch.cat([angles_LK, angles_LK], dim=-1)
        self.register_buffer("cos_LD", angles_LD.cos().float(), persistent=False)
        self.register_buffer("sin_LD", angles_LD.sin().float(), persistent=False)

    def forward(self, positions_BL: Tensor) -> Rotary:
        return self.cos_LD[positions_BL][:, None], self.sin_LD[positions_BL][:, None]


def rotate(x_BNLD: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = (table.to(x_BNLD.dtype) for table in rotary)
    a, b = x_BNLD.chunk(2, dim=-1)
    return x_BNLD * cos + torch.cat([-b, a], dim=-1) * sin


def heads(x_BLH: Tensor, num_heads: int) -> Tensor:
    """`[B, N, L, D]`"""
    return x_BLH.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attention(
    q_BQH: Tensor,
    k_BTH: Tensor,
    v_BTH: Tensor,
    num_heads: int,
    query_rotary: Rotary,
    key_rotary: Rotary,
    mask: Tensor | None,
) -> Tensor:
    """Eager attention `[B, Q, H]` of rotated queries and keys; a boolean mask is True where a key may be read."""
    q, k, v = (heads(x, num_heads) for x in (q_BQH, k_BTH, v_BTH))
    q, k = rotate(q, query_rotary), rotate(k, key_rotary)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def feed_forward(hidden_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_size, 4 * hidden_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(4 * hidden_size, hidden_size),
    )


class SelfAttentionBlock(nn.Module):
    """An adaLN transformer block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, self.dropout = config.num_heads, nn.Dropout(config.dropout)
        self.norm1 = WeightNorm(hidden)
        self.attn_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = WeightNorm(hidden)
        self.mlp = feed_forward(hidden)
        self.adaLN_modulation = nn.Linear(config.condition_size, 6 * hidden)

    def forward(self, x_BLH: Tensor, rotary: Rotary, mask: Tensor | None, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        q, k, v = self.attn_qkv(modulate(self.norm1(x_BLH), shift1, scale1)).chunk(3, dim=-1)
        attended = attention(q, k, v, self.num_heads, rotary, rotary, mask)
        x_BLH = x_BLH + gate1 * self.dropout(self.attn_out(attended))
        return x_BLH + gate2 * self.dropout(self.mlp(modulate(self.norm2(x_BLH), shift2, scale2)))


class ModulatedOutput(nn.Module):
    """Norm, modulation and all logits at once."""

    def __init__(self, config: Any, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = WeightNorm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, vocab_size)
        self.adaLN_modulation = nn.Linear(config.condition_size, 2 * config.hidden_size)

    def forward(self, x_BLH: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x_BLH), shift, scale))
