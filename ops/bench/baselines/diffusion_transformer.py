"""MDLM's transformer as published: full-length, not conditioned on time, all logits at once (FACTS 1.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.bench.baselines.layers import (
    ModulatedOutput,
    PublishedModel,
    RotaryAngles,
    SelfAttentionBlock,
    TokenEmbedding,
    ZeroTime,
)
from pgm_scale.config import DiffusionTransformerConfig


class DenseDiffusionTransformer(PublishedModel):
    """Every position attends to every position."""

    def __init__(self, config: DiffusionTransformerConfig, vocab_size: int, length: int) -> None:
        nn.Module.__init__(self)
        assert not config.time_conditioned, "the cached sampler needs a model without time"
        self.vocab_embed = TokenEmbedding(vocab_size, config.hidden_size)
        self.sigma_map = ZeroTime(config.condition_size)
        self.rotary_emb = RotaryAngles(length, config.hidden_size // config.num_heads)
        self.blocks = nn.ModuleList(SelfAttentionBlock(config) for _ in range(config.num_blocks))
        self.output_layer = ModulatedOutput(config, vocab_size)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits `[B, L, V]` of every position, masked or not."""
        condition = self.sigma_map()
        rotary = self.rotary_emb(torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None])
        x_BLH = self.vocab_embed(tokens_BL)
        for block in self.blocks:
            x_BLH = block(x_BLH, rotary, None, condition)
        return self.output_layer(x_BLH, condition)
