"""The VQ autoencoder's loss (van den Oord et al., arXiv 1711.00937, equation 3; normalised as in FACTS 9).

    mean (x - D(z_q))^2  +  mean (sg[z] - e)^2  +  commitment_weight * mean (z - sg[e])^2

of each image, with pixels in [-1, 1], unit features z, and e the unit codebook row nearest to each. The decoder
reads z_q = z + sg[e - z]: its gradient goes to the encoder as if the quantiser were not there. A codebook row
learns from the second term alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pgm_scale.config import VQObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.models.vq import VQPass
from pgm_scale.objectives.base import DrawSpec, Inputs, LossTerms, ModelCall, Objective, Rows


@dataclass(frozen=True)
class VQInputs(Inputs):
    """uint8 [B, L] pixel values in the order (row, column, channel); B rows."""

    pixels_BL: torch.Tensor
    rows: Rows


class VQObjective(Objective):
    """The loss of an image, times its number of values, which the trainer divides by; nothing is drawn."""

    is_likelihood = False

    def __init__(self, config: VQObjectiveConfig) -> None:
        self.config = config

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return batch.valid_BL.sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> VQInputs:
        values_B = self.scored_tokens(batch)
        rows = Rows.of(
            weight_S=values_B,
            scored_tokens_S=values_B,
            mask_fraction_S=np.zeros(len(values_B)),
            sequence_S=np.arange(len(values_B)),
        )
        return VQInputs(torch.from_numpy(batch.tokens_BL.astype(np.uint8)), rows)

    validation_inputs = training_inputs

    def call(self, inputs: VQInputs) -> ModelCall:
        return ModelCall((inputs.pixels_BL,), squared_errors)

    def terms(self, errors: tuple[torch.Tensor, ...], inputs: VQInputs) -> LossTerms:
        reconstruction_B, codebook_B, commitment_B, counts_K = errors
        loss_B = reconstruction_B + codebook_B + self.config.commitment_weight * commitment_B
        return LossTerms(
            inputs.rows.weight_S * loss_B,
            None,
            inputs.rows.scored_tokens_S,
            inputs.rows.mask_fraction_S,
            inputs.rows.sequence_S,
            counts_K,
        )


def squared_errors(passed: VQPass) -> tuple[torch.Tensor, ...]:
    """Mean squared error of each image's reconstruction, codebook and commitment, fp32 [B]; int64 code counts [K].

    A plain tuple, in which ZeRO-3 finds the tensors.
    """
    features, rows = passed.features_BhwC, passed.rows_BhwC
    return (
        _mean_square(passed.reconstruction_BCHW - passed.images_BCHW),
        _mean_square(features.detach() - rows),
        _mean_square(features - rows.detach()),
        passed.code_counts_K,
    )


def _mean_square(differences: torch.Tensor) -> torch.Tensor:
    return differences.square().flatten(1).mean(dim=1)
