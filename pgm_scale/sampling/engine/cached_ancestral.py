"""MDLM's cached ancestral sampler with a folded model: it computes what a step can change, and what it draws.

The first block's queries, keys and values depend on a token and its position alone: they are kept, and made anew
only where a token was drawn. The last block answers for the positions to draw, padded to the same number in every
row (opened counts differ by a few). PGM's sampler gets no more than this, so the two compare fairly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgm_scale.sampling.ancestral import opening_steps
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import DecodingStep, decode
from pgm_scale.sampling.engine.diffusion import FoldedDiffusionTransformer
from pgm_scale.sampling.engine.layouts import DenseLayout


class CachedAncestralSampler:
    """The tokens of `sample_ancestral_cached`."""

    def __init__(self, model: FoldedDiffusionTransformer):
        self.model = model

    def __call__(self, batch: SamplingBatch) -> tuple[Tensor, int]:
        return decode(self.model, FirstBlockCache(self.model, batch), batch, opening_steps(batch))


class FirstBlockCache:
    """A `Predict` for one batch that keeps the embeddings and the first block's projections of all its rows."""

    def __init__(self, model: FoldedDiffusionTransformer, batch: SamplingBatch):
        tokens_BL = batch.canvas_BL()
        self.model = model
        x_TH = model.embed(tokens_BL.flatten())
        qkv_3TND = model.blocks[0].project(x_TH, model.factors(*tokens_BL.shape))
        self.x_BLH = x_TH.view(*tokens_BL.shape, -1)
        self.qkv_3BLND = torch.stack(qkv_3TND).unflatten(1, tokens_BL.shape)

    def __call__(self, model: Any, batch: SamplingBatch, step: DecodingStep) -> Tensor:
        rows, length = step.masked_BL.shape
        layout = DenseLayout(rows)
        factors_T = self.model.factors(rows, length)
        encoded_TH = self._encode(batch.on_device(step.rows_B), factors_T, layout)
        # Row-major: the targets of row 0 in slots 0, 1, ..., then those of row 1; slots left over ask for column 0.
        rows_Q, columns_Q = np.nonzero(step.target_BL)
        slots_Q = np.arange(len(rows_Q)) - np.searchsorted(rows_Q, rows_Q)
        asked_Bm = np.repeat(np.arange(rows)[:, None] * length, slots_Q.max() + 1, axis=1)
        asked_Bm[rows_Q, slots_Q] += columns_Q
        asked_P = batch.on_device(asked_Bm.reshape(-1))
        y_PH = self.model.finish(encoded_TH, factors_T, encoded_TH[asked_P], factors_T[asked_P], layout)
        draw = batch.draw(step.uniforms_Q, rows_Q * asked_Bm.shape[1] + slots_Q)
        drawn_Q = self.model.output(y_PH, draw)
        self._update(batch.on_device(step.rows_B[rows_Q]), batch.on_device(columns_Q), drawn_Q)
        return drawn_Q

    def _encode(self, rows_B: Tensor, factors_T: Tensor, layout: DenseLayout) -> Tensor:
        """All blocks but the last, for those rows that take part."""
        first, *others = self.model.blocks
        x_BLH, qkv_3BLND = self.x_BLH, self.qkv_3BLND
        if len(rows_B) < len(x_BLH):
            x_BLH, qkv_3BLND = x_BLH[rows_B], qkv_3BLND[:, rows_B]
        x_TH = first.finish(x_BLH.flatten(0, 1), layout.attend(*qkv_3BLND.flatten(1, 2)))
        for block in others:
            x_TH = block(x_TH, factors_T, layout.attend)
        return x_TH

    def _update(self, rows_Q: Tensor, columns_Q: Tensor, tokens_Q: Tensor) -> None:
        x_QH = self.model.embed(tokens_Q)
        self.x_BLH[rows_Q, columns_Q] = x_QH
        qkv_3QND = self.model.blocks[0].project(x_QH, self.model.rotation.table_L[columns_Q])
        self.qkv_3BLND[:, rows_Q, columns_Q] = torch.stack(qkv_3QND)
