"""MDLM's diffusion transformer: bidirectional attention over all tokens, adaLN (FACTS 1.2, 1.5)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.config import DiffusionTransformerConfig
from pgm_scale.models.blocks import OutputLayer, SelfAttentionBlock
from pgm_scale.models.layers import LOCAL_LAYERS, LayerBuilder, RotaryTable, TimeEmbedding
from pgm_scale.models.readout import Readout, logits
from pgm_scale.models.stages import Span, numbered, whole_span


class DiffusionTransformer(nn.Module):
    """Logits of every position from masked tokens; the noise level counts only if `time_conditioned`.

    A pipeline stage holds a `span` of its units (`models.stages`).
    """

    def __init__(
        self,
        config: DiffusionTransformerConfig,
        vocab_size: int,
        length: int,
        layers: LayerBuilder = LOCAL_LAYERS,
        span: Span | None = None,
    ):
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.span = span = span or whole_span(config)
        hidden, condition = config.hidden_size, config.condition_size
        self.vocab_embed = layers.vocab_embedding(vocab_size, hidden) if 0 in span else None
        self.sigma_map = TimeEmbedding(condition, layers)
        self.rotary_emb = RotaryTable(length, hidden // config.num_heads)
        self.blocks = numbered(
            {
                number: SelfAttentionBlock(hidden, config.num_heads, config.dropout, condition, layers)
                for number in span.numbers(1, config.num_blocks)
            }
        )
        self.output_layer = (
            OutputLayer(hidden, vocab_size, condition, layers) if 1 + config.num_blocks in span else None
        )

    def forward(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor | None = None,
        readout: Readout = logits,
        received: Tensor | None = None,
    ) -> Any:
        """The readout of `[B, L, H]`; by default fp32 logits `[B, L, V]`.

        Args:
            tokens_BL: int64 token ids, masked ones included; L may be shorter than the model's length.
            sigma_B: noise levels, needed by a time-conditioned model and ignored by any other.
            readout: what to make of the hidden states.
            received: the stream `[B * L, H]` of the stage before, in a stage that starts inside the model; one
                that ends inside returns its own.
        """
        x_TH = received if self.vocab_embed is None else self.vocab_embed(tokens_BL.flatten())
        assert x_TH is not None, "a stage without the embedding needs what the stage before it sends"
        if self.config.time_conditioned:
            assert sigma_B is not None, "a time-conditioned model needs sigma"
            condition = self.sigma_map(sigma_B[:, None], x_TH.dtype)
        else:
            condition = self.sigma_map(x_TH.new_zeros(()), x_TH.dtype)
        sequences, length = tokens_BL.shape
        positions_T = torch.arange(length, device=tokens_BL.device).repeat(sequences)
        rotary = self.rotary_emb(positions_T, x_TH.dtype)
        attend = partial(full_attention, sequences=sequences)
        for block in self.blocks:
            x_TH = block(x_TH, rotary, attend, condition)
        if self.output_layer is None:
            return x_TH
        return self.output_layer(x_TH, condition, readout, tokens_BL.shape)

    def rows_before(self, unit: int, tokens_BL: Tensor, sigma_B: Tensor | None = None) -> int:
        """Rows of H that pass into a unit from the one before it."""
        return tokens_BL.numel()


def full_attention(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, sequences: int) -> Tensor:
    """Every position reads every position of its sequence; T = sequences * L."""
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q_TND, k_TND, v_TND))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
