"""One forward pass for codes of images, by either class-conditional model, with guidance.

The Partition Transformer gets the clean tokens only and answers for the targets only; MaskGIT's transformer gets
the whole grid and answers for all of it. Rows are images: BOS, then the codes of a grid, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pgm_scale.config import QUIRKS, SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.models.maskgit import MaskGITTransformer
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.categorical import TokenDraw
from pgm_scale.sampling.decode import DecodingStep
from pgm_scale.sampling.guidance import GuidedRows, guidance_weights
from pgm_scale.sampling.packed import in_equal_rows, packed_inputs, without_latest


@dataclass(frozen=True)
class CodeReader:
    """A `Predict` for images: what the step's targets become, in row-major order.

    Attributes:
        draw: makes them, one token each, from their hidden states.
        steps_B: int64, in how many steps each of the batch's rows is decoded.
        ranks_BL: int64, when each of the batch's tokens is decoded, no two of a row alike; known ones come first.
    """

    draw: type[TokenDraw]
    steps_B: np.ndarray
    ranks_BL: np.ndarray

    def __call__(self, model: Any, batch: SamplingBatch, step: DecodingStep) -> torch.Tensor:
        read = self._read_grids if isinstance(model, MaskGITTransformer) else in_equal_rows(self._read_packed)
        return read(model, batch, step)

    def _read_grids(self, model: Any, batch: SamplingBatch, step: DecodingStep) -> torch.Tensor:
        rows = self._guided_rows(model, batch, step)
        code_targets_RK = step.target_BL[
            rows.rows_R, 1:
        ]  # its hidden states are those of the codes, without BOS
        readout = rows.readout(
            self._draw(batch, step), np.nonzero(step.target_BL)[0], np.flatnonzero(code_targets_RK)
        )
        tokens_RL = step.tokens_BL[batch.on_device(rows.rows_R)]
        return model(tokens_RL, batch.on_device(rows.classes_R), readout=readout)

    def _read_packed(self, model: Any, batch: SamplingBatch, step: DecodingStep) -> torch.Tensor:
        """For rows with equal numbers of clean tokens and of targets."""
        rows = self._guided_rows(model, batch, step)
        registers, clean_BL = model.config.registers, ~step.masked_BL
        if "register_offset" in batch.config.quirks:
            clean_BL = without_latest(clean_BL, self.ranks_BL[step.rows_B], registers // 2)
        target_RL = step.target_BL[rows.rows_R]
        inputs = packed_inputs(
            step.tokens_BL[batch.on_device(rows.rows_R)],
            clean_BL[rows.rows_R],
            target_RL,
            registers,
            batch.on_device(rows.classes_R),
        )
        places_P = np.arange(target_RL.sum())
        readout = rows.readout(self._draw(batch, step), np.nonzero(step.target_BL)[0], places_P)
        return model(inputs, readout=readout)

    def _draw(self, batch: SamplingBatch, step: DecodingStep) -> TokenDraw:
        return self.draw(batch.rules_at(step.number), batch.on_device(step.uniforms_Q))

    def _guided_rows(self, model: Any, batch: SamplingBatch, step: DecodingStep) -> GuidedRows:
        assert batch.labels_B is not None, "image models are class-conditional"
        weights_B = guidance_weights(batch.config, step.number, self.steps_B[step.rows_B])
        return GuidedRows.of(batch.labels_B[step.rows_B], weights_B, model.config.num_classes)


def check_quirks(config: SamplerConfig, model: Any) -> None:
    """Refuse quirks of another model or sampler, which would change nothing."""
    kind: str = model.config.kind
    for quirk in config.quirks:
        model_kind, sampler_kinds = QUIRKS[quirk]
        if kind != model_kind or config.kind not in sampler_kinds:
            raise UserError(
                f"sampler.quirks {quirk} is one of a {model_kind} with sampler.kind {' or '.join(sampler_kinds)}, "
                f"not of a {kind} with {config.kind}; leave it out"
            )
