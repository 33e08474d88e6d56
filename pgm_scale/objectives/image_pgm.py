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
from pgm_scale.objectives.base import DrawSpec, LossTerms, ModelCall, Objective
from pgm_scale.objectives.image_draws import (
    BOS_TOKENS,
    ImageDraws,
    scored_codes,
    training_draws,
    validation_draws,
)
from pgm_scale.objectives.pgm import Partition, PGMInputs, pack, packed_call, packed_terms


class ImagePGMObjective(Objective):
    """See the module's docstring."""

    is_likelihood = False

    def __init__(
        self, config: ImagePGMObjectiveConfig, vocabulary: Vocabulary, num_classes: int, registers: int
    ) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.num_classes, self.registers = num_classes, registers

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scored_codes(batch, self.vocabulary).sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> PGMInputs:
        return self._inputs(batch, training_draws(batch, spec, self.config, self.num_classes))

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> PGMInputs:
        """The same loss, with every label."""
        return self._inputs(batch, validation_draws(batch, spec, self.config, self.num_classes))

    def call(self, inputs: PGMInputs) -> ModelCall:
        """The NLL of each code, the mask's own logit removed; that of BOS is not, as published."""
        return packed_call(inputs, self.vocabulary)

    def terms(self, nll_Q: torch.Tensor, inputs: PGMInputs) -> LossTerms:
        return packed_terms(nll_Q, inputs)

    def _inputs(self, batch: TokenBatch, draws: ImageDraws) -> PGMInputs:
        in_group1_BL = np.pad(draws.hidden_BK, ((0, 0), (BOS_TOKENS, 0)))
        partition = Partition(in_group1_BL, np.ones((len(in_group1_BL), 2)))
        return pack(batch, partition, self.vocabulary, self.registers, BOS_TOKENS, draws.labels_B)
