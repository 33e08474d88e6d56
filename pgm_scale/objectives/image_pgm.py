"""The partition objective of images: unweighted cross-entropy of every code from the other group (FACTS 2.2).

Each code is in group 1 with probability r', which a mask schedule makes of a uniform number, one a sequence. BOS
is in group 0, for it is all that is known when sampling starts, and the registers are half in either group. The
loss is the mean over all codes, so it is no bound on the likelihood.
"""

from __future__ import annotations

import numpy as np
import torch

from pgm_scale.config import ImagePGMObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import bernoulli_mask, sequential_uniform, stratified_uniform
from pgm_scale.diffusion.mask_schedules import mask_ratio
from pgm_scale.objectives.base import DrawSpec, LossTerms, ModelCall, scorable
from pgm_scale.objectives.labels import class_labels, training_labels
from pgm_scale.objectives.pgm import Partition, PGMInputs, pack, packed_call, packed_terms

BOS_TOKENS = 1  # in front of the codes


class ImagePGMObjective:
    """See the module's docstring."""

    is_likelihood = False

    def __init__(
        self, config: ImagePGMObjectiveConfig, vocabulary: Vocabulary, num_classes: int, registers: int
    ) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.num_classes, self.registers = num_classes, registers

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scorable(batch, self.vocabulary)[:, BOS_TOKENS:].sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> PGMInputs:
        numbers_B = batch.sample_numbers_B
        u_B = stratified_uniform(spec.seed, numbers_B, spec.global_batch_sequences, "training/time")
        labels_B = training_labels(batch, spec, self.config.label_drop, self.num_classes)
        return self._inputs(batch, u_B, spec.seed, "training/partition", labels_B)

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> PGMInputs:
        """The same loss, with every label."""
        u_B = sequential_uniform(spec.seed, batch.sample_numbers_B, "validation/time")
        labels_B = class_labels(batch, self.num_classes)
        return self._inputs(batch, u_B, spec.seed, "validation/partition", labels_B)

    def call(self, inputs: PGMInputs) -> ModelCall:
        """The NLL of each code, the mask's own logit removed; that of BOS is not, as published."""
        return packed_call(inputs, self.vocabulary)

    def terms(self, nll_Q: torch.Tensor, inputs: PGMInputs) -> LossTerms:
        return packed_terms(nll_Q, inputs)

    def _inputs(
        self, batch: TokenBatch, u_B: np.ndarray, seed: int, stream: str, labels_B: np.ndarray
    ) -> PGMInputs:
        sequences, length = batch.tokens_BL.shape
        ratio_B = mask_ratio(self.config.mask_schedule, u_B)
        in_group1_BL = np.zeros((sequences, length), bool)
        in_group1_BL[:, BOS_TOKENS:] = bernoulli_mask(
            seed, batch.sample_numbers_B, stream, ratio_B, length - BOS_TOKENS
        )
        partition = Partition(in_group1_BL, np.ones((sequences, 2)))
        return pack(batch, partition, self.vocabulary, self.registers, BOS_TOKENS, labels_B)
