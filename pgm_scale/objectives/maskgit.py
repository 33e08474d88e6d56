"""MaskGIT's objective (FACTS 2.2): unweighted cross-entropy of all codes of an image, some of them masked.

Each code is masked with probability r', which a mask schedule makes of a uniform number, one an image. Codes that
were left visible are predicted too, at the same weight, so the loss is no bound on the likelihood. The mask itself
is never predicted: its logit is left out of the softmax, as for the other models.

Validation masks as training does, with fixed draws and all labels; published, it masks nothing (FACTS 8.18).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pgm_scale.config import MaskGITObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models.readout import TokenNLL
from pgm_scale.objectives.base import DrawSpec, Inputs, LossTerms, ModelCall, Objective, Rows, finite_targets
from pgm_scale.objectives.image_draws import (
    BOS_TOKENS,
    ImageDraws,
    scored_codes,
    training_draws,
    validation_draws,
)


@dataclass(frozen=True)
class MaskedImageInputs(Inputs):
    """Images, one row each.

    Attributes:
        noisy_BL: int64 rows of data, BOS first, the mask id where a code is masked.
        classes_B: int64 class of each, `num_classes` for none.
        targets_BK, scored_BK: int64 codes and bool whether they are scored, without BOS.
        rows: B rows.
    """

    noisy_BL: torch.Tensor
    classes_B: torch.Tensor
    targets_BK: torch.Tensor
    scored_BK: torch.Tensor
    rows: Rows


class MaskGITObjective(Objective):
    """See the module's docstring."""

    is_likelihood = False

    def __init__(self, config: MaskGITObjectiveConfig, vocabulary: Vocabulary, num_classes: int) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.num_classes = num_classes

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scored_codes(batch, self.vocabulary).sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> MaskedImageInputs:
        return self._inputs(batch, training_draws(batch, spec, self.config, self.num_classes))

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> MaskedImageInputs:
        """The same loss, with every label."""
        return self._inputs(batch, validation_draws(batch, spec, self.config, self.num_classes))

    def call(self, inputs: MaskedImageInputs) -> ModelCall:
        readout = TokenNLL(inputs.targets_BK, self.vocabulary.mask_id, inputs.scored_BK.float())
        return ModelCall((inputs.noisy_BL, inputs.classes_B), readout)

    def terms(self, nll_BK: torch.Tensor, inputs: MaskedImageInputs) -> LossTerms:
        return inputs.rows.terms((nll_BK * inputs.scored_BK).sum(dim=1))

    def _inputs(self, batch: TokenBatch, draws: ImageDraws) -> MaskedImageInputs:
        noisy_BL = batch.tokens_BL.copy()
        noisy_BL[:, BOS_TOKENS:][draws.hidden_BK] = self.vocabulary.mask_id
        scored_BK = scored_codes(batch, self.vocabulary)
        rows = Rows.of(
            weight_S=np.ones(len(noisy_BL)),
            scored_tokens_S=scored_BK.sum(axis=1),
            mask_fraction_S=draws.hidden_BK.mean(axis=1),
            sequence_S=np.arange(len(noisy_BL)),
        )
        return MaskedImageInputs(
            noisy_BL=torch.from_numpy(noisy_BL),
            classes_B=torch.from_numpy(draws.labels_B),
            targets_BK=torch.from_numpy(finite_targets(batch.tokens_BL, self.vocabulary)[:, BOS_TOKENS:]),
            scored_BK=torch.from_numpy(scored_BK),
            rows=rows,
        )
