"""MDLM's transformer folded for sampling, for models without time conditioning."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pgm_scale.models.dit import DiffusionTransformer
from pgm_scale.models.readout import Readout, logits
from pgm_scale.sampling.engine.blocks import FixedCrossAttention, FixedSelfAttention
from pgm_scale.sampling.engine.layouts import DenseLayout
from pgm_scale.sampling.engine.linear import fixed_linear
from pgm_scale.sampling.engine.output import FixedOutput
from pgm_scale.sampling.engine.rotary import Rotation


class FoldedDiffusionTransformer:
    """A `DiffusionTransformer` whose weights stay as they are while this lives.

    The last block computes its queries, output and MLP only for the tokens that are asked for.
    """

    def __init__(self, model: DiffusionTransformer):
        parts: Any = model
        self.config, self.length = model.config, model.length
        self.embedding_VH = parts.vocab_embed.embedding.detach()
        condition = model.sigma_map(self.embedding_VH.new_zeros(()), self.embedding_VH.dtype)
        self.rotation = Rotation(model.rotary_emb, self.embedding_VH.dtype)
        *first, last = parts.blocks
        self.blocks = [FixedSelfAttention(block, condition, self.rotation) for block in first]
        self.last = FixedCrossAttention.of_last(last, condition, self.rotation)
        self.last_key = fixed_linear(self.last.key_weight)
        self.output = FixedOutput(parts.output_layer, condition)

    def __call__(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, readout: Readout = logits) -> Any:
        """As `DiffusionTransformer.forward`; the noise level does not count."""
        sequences, length = tokens_BL.shape
        factors_T = self.factors(sequences, length)
        layout = DenseLayout(sequences)
        x_TH = self.embed(tokens_BL.flatten())
        for block in self.blocks:
            x_TH = block(x_TH, factors_T, layout.attend)
        y_TH = self.finish(x_TH, factors_T, x_TH, factors_T, layout)
        return self.output(y_TH, readout, tokens_BL.shape)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding_VH)

    def factors(self, sequences: int, length: int) -> Tensor:
        """The rotary factors of B * L packed tokens."""
        return self.rotation.table_L[:length].repeat(sequences, *[1] * (self.rotation.table_L.dim() - 1))

    def finish(
        self,
        x_TH: Tensor,
        factors_T: Tensor,
        targets_QH: Tensor,
        target_factors_Q: Tensor,
        layout: DenseLayout,
    ) -> Tensor:
        """The last block's output for the targets, a selection of its inputs x."""
        normed_TH = self.last.norm(x_TH)
        k_TND = self.last_key(normed_TH).unflatten(-1, (self.config.num_heads, -1))
        k_TND = self.rotation.rotate_(k_TND, factors_T)
        return self.last(targets_QH, target_factors_Q, k_TND, normed_TH, layout)
