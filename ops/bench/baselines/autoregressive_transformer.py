"""The autoregressive transformer with a plain key-value cache, which grows by concatenation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.bench.baselines.layers import (
    PublishedModel,
    Rotary,
    RotaryAngles,
    TokenEmbedding,
    WeightNorm,
    feed_forward,
    heads,
    rotate,
)
from pgm_scale.config import AutoregressiveTransformerConfig

Cache = list[tuple[Tensor, Tensor]]  # rotated keys and values of each block, [B, N, T, D]


class CachedAutoregressiveTransformer(PublishedModel):
    """Logits of the next token; no adaLN (FACTS 1.5)."""

    def __init__(self, config: AutoregressiveTransformerConfig, vocab_size: int, length: int) -> None:
        nn.Module.__init__(self)
        self.vocab_embed = TokenEmbedding(vocab_size, config.hidden_size)
        self.rotary_emb = RotaryAngles(length, config.hidden_size // config.num_heads)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.num_blocks))
        self.output_layer = PlainOutput(config.hidden_size, vocab_size)

    def forward(self, tokens_Bn: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits `[B, n, V]` and the cache with these tokens; with a cache, n is 1."""
        seen = 0 if cache is None else cache[0][0].shape[2]
        assert cache is None or tokens_Bn.shape[1] == 1, "with a cache, one token a call"
        positions_n = torch.arange(seen, seen + tokens_Bn.shape[1], device=tokens_Bn.device)
        rotary = self.rotary_emb(positions_n[None])
        x_BnH, extended = self.vocab_embed(tokens_Bn), []
        for index, block in enumerate(self.blocks):
            x_BnH, entry = block(x_BnH, rotary, None if cache is None else cache[index])
            extended.append(entry)
        return self.output_layer(x_BnH), extended


class CausalBlock(nn.Module):
    def __init__(self, config: AutoregressiveTransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, self.dropout = config.num_heads, nn.Dropout(config.dropout)
        self.norm1, self.norm2 = WeightNorm(hidden), WeightNorm(hidden)
        self.attn_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = feed_forward(hidden)

    def forward(
        self, x_BnH: Tensor, rotary: Rotary, cached: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        qkv = self.attn_qkv(self.norm1(x_BnH)).chunk(3, dim=-1)
        q, k, v = (heads(x, self.num_heads) for x in qkv)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cached is not None:
            k, v = torch.cat([cached[0], k], dim=2), torch.cat([cached[1], v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cached is None)
        x_BnH = x_BnH + self.dropout(self.attn_out(attended.transpose(1, 2).flatten(2)))
        return x_BnH + self.dropout(self.mlp(self.norm2(x_BnH))), (k, v)


class PlainOutput(nn.Module):
    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = WeightNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, vocab_size)

    def forward(self, x_BnH: Tensor) -> Tensor:
        return self.linear(self.norm_final(x_BnH))
