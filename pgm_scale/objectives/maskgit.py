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
from pgm_scale.diffusion.draws import bernoulli_mask, sequential_uniform, stratified_uniform
from pgm_scale.diffusion.mask_schedules import mask_ratio
from pgm_scale.models.readout import TokenNLL
from pgm_scale.objectives.base import DrawSpec, Inputs, LossTerms, ModelCall, Rows, finite_targets, scorable
from pgm_scale.objectives.image_pgm import BOS_TOKENS
from pgm_scale.objectives.labels import class_labels, training_labels


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


class MaskGITObjective:
    """See the module's docstring."""

    is_likelihood = False

    def __init__(self, config: MaskGITObjectiveConfig, vocabulary: Vocabulary, num_classes: int) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.num_classes = num_classes

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scorable(batch, self.vocabulary)[:, BOS_TOKENS:].sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> MaskedImageInputs:
        numbers_B = batch.sample_numbers_B
        u_B = stratified_uniform(spec.seed, numbers_B, spec.global_batch_sequences, "training/time")
        labels_B = training_labels(batch, spec, self.config.label_drop, self.num_classes)
        return self._inputs(batch, u_B, spec.seed, "training/partition", labels_B)

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> MaskedImageInputs:
        """The same loss, with every label."""
        u_B = sequential_uniform(spec.seed, batch.sample_numbers_B, "validation/time")
        labels_B = class_labels(batch, self.num_classes)
        return self._inputs(batch, u_B, spec.seed, "validation/partition", labels_B)

    def call(self, inputs: MaskedImageInputs) -> ModelCall:
        readout = TokenNLL(inputs.targets_BK, self.vocabulary.mask_id, inputs.scored_BK.float())
        return ModelCall((inputs.noisy_BL, inputs.classes_B), readout)

    def terms(self, nll_BK: torch.Tensor, inputs: MaskedImageInputs) -> LossTerms:
        return inputs.rows.terms((nll_BK * inputs.scored_BK).sum(dim=1))

    def _inputs(
        self, batch: TokenBatch, u_B: np.ndarray, seed: int, stream: str, labels_B: np.ndarray
    ) -> MaskedImageInputs:
        sequences, length = batch.tokens_BL.shape
        ratio_B = mask_ratio(self.config.mask_schedule, u_B)
        masked_BK = bernoulli_mask(seed, batch.sample_numbers_B, stream, ratio_B, length - BOS_TOKENS)
        noisy_BL = batch.tokens_BL.copy()
        noisy_BL[:, BOS_TOKENS:][masked_BK] = self.vocabulary.mask_id
        scored_BK = scorable(batch, self.vocabulary)[:, BOS_TOKENS:]
        rows = Rows.of(
            weight_S=np.ones(sequences),
            scored_tokens_S=scored_BK.sum(axis=1),
            mask_fraction_S=masked_BK.mean(axis=1),
            sequence_S=np.arange(sequences),
        )
        return MaskedImageInputs(
            noisy_BL=torch.from_numpy(noisy_BL),
            classes_B=torch.from_numpy(labels_B),
            targets_BK=torch.from_numpy(finite_targets(batch.tokens_BL, self.vocabulary)[:, BOS_TOKENS:]),
            scored_BK=torch.from_numpy(scored_BK),
            rows=rows,
        )
