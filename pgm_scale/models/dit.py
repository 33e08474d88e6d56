"""MDLM's diffusion transformer: bidirectional attention over all tokens, adaLN (FACTS 1.2, 1.5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.config import DiffusionTransformerConfig
from pgm_scale.models.blocks import OutputLayer, SelfAttentionBlock
from pgm_scale.models.layers import LOCAL_LAYERS, LayerBuilder, RotaryTable, TimeEmbedding
from pgm_scale.models.readout import Readout, logits


class DiffusionTransformer(nn.Module):
    """Logits of every position from masked tokens; the noise level counts only if `time_conditioned`."""

    def __init__(
        self,
        config: DiffusionTransformerConfig,
        vocab_size: int,
        length: int,
        layers: LayerBuilder = LOCAL_LAYERS,
    ):
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.vocab_embed = layers.vocab_embedding(vocab_size, config.hidden_size)
        self.sigma_map = TimeEmbedding(config.condition_size, layers)
        self.rotary_emb = RotaryTable(length, config.hidden_size // config.num_heads)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(
                config.hidden_size, config.num_heads, config.dropout, config.condition_size, layers
            )
            for _ in range(config.num_blocks)
        )
        self.output_layer = OutputLayer(config.hidden_size, vocab_size, config.condition_size, layers)

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, readout: Readout = logits) -> Any:
        """The readout of `[B, L, H]`; by default fp32 logits `[B, L, V]`.

        Args:
            tokens_BL: int64 token ids, masked ones included; L may be shorter than the model's length.
            sigma_B: noise levels, needed by a time-conditioned model and ignored by any other.
            readout: what to make of the hidden states.
        """
        x_BLH = self.vocab_embed(tokens_BL)
        if self.config.time_conditioned:
            assert sigma_B is not None, "a time-conditioned model needs sigma"
            condition = self.sigma_map(sigma_B[:, None], x_BLH.dtype)
        else:
            condition = self.sigma_map(x_BLH.new_zeros(()), x_BLH.dtype)
        positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        rotary = self.rotary_emb(positions_L, x_BLH.dtype)
        for block in self.blocks:
            x_BLH = block(x_BLH, rotary, full_attention, condition)
        return self.output_layer(x_BLH, condition, readout)


def full_attention(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Tensor:
    """Every position reads every position of its sequence."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
