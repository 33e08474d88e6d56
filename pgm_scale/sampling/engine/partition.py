"""The Partition Transformer folded for sampling: it answers as the model does, from the same packed inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgm_scale.models.partition_transformer import PartitionInputs, PartitionTransformer
from pgm_scale.models.readout import Readout, logits
from pgm_scale.sampling.engine.blocks import FixedCrossAttention, FixedSelfAttention
from pgm_scale.sampling.engine.folding import FixedNorm
from pgm_scale.sampling.engine.group_swap import FixedGroupSwap
from pgm_scale.sampling.engine.layouts import Layout, layout_of
from pgm_scale.sampling.engine.linear import fixed_linear
from pgm_scale.sampling.engine.output import FixedOutput
from pgm_scale.sampling.engine.rotary import Rotation


class FoldedPartitionTransformer:
    """A `PartitionTransformer` whose weights stay as they are while this lives."""

    def __init__(self, model: PartitionTransformer):
        parts: Any = model
        self.config, self.length = model.config, model.length
        self.embedding_VH = parts.vocab_embed.embedding.detach()
        condition = parts.sigma_map(self.embedding_VH.new_zeros(()), self.embedding_VH.dtype)
        self.rotation = Rotation(model.rotary_emb, self.embedding_VH.dtype)
        self.encoder = [FixedSelfAttention(block, condition, self.rotation) for block in parts.encoder.blocks]
        self.group_swap = FixedGroupSwap(parts.decoder.group_swap, model.length, self.rotation)
        layers = parts.decoder.layers
        self.decoder = [FixedCrossAttention.of(layer, condition, self.rotation) for layer in layers]
        # One norm serves all decoder blocks: their own weights went into their keys' and values' projections.
        self.encoded_norm = FixedNorm.without_weight(layers[0].kv_norm1)
        self.keys = fixed_linear(torch.cat([layer.key_weight for layer in self.decoder]))
        self.output = FixedOutput(parts.output_layer, condition)

    def __call__(self, inputs: PartitionInputs, readout: Readout = logits) -> Any:
        """As `PartitionTransformer.forward`."""
        layout = layout_of(inputs)
        factors_T = self.rotation.table_L[inputs.positions_T]
        x_TH = self.embed(inputs.tokens_T)
        for block in self.encoder:
            x_TH = block(x_TH, factors_T, layout.attend)
        return self.predict(x_TH, factors_T, inputs.query_positions_Q, layout, readout)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding_VH)

    def predict(
        self,
        encoded_TH: Tensor,
        factors_T: Tensor,
        query_positions_Q: Tensor,
        layout: Layout,
        readout: Readout,
    ) -> Any:
        """The readout of the query positions, from the encoder's output and its tokens' rotary factors."""
        query_factors_Q = self.rotation.table_L[query_positions_Q]
        y_QH = self.group_swap(query_positions_Q, encoded_TH, factors_T, layout)
        normed_TH = self.encoded_norm(encoded_TH)
        num_blocks, num_heads = len(self.decoder), self.config.num_heads
        keys_TKND = self.keys(normed_TH).unflatten(-1, (num_blocks, num_heads, -1))
        keys_TKND = self.rotation.rotate_(keys_TKND, factors_T[:, None])
        for block, k_TND in zip(self.decoder, keys_TKND.unbind(1), strict=True):
            y_QH = block(y_QH, query_factors_Q, k_TND, normed_TH, layout)
        return self.output(y_QH, readout)
