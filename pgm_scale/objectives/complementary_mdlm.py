"""Masked diffusion on a mask and on its complement: 2 rows a sequence, one forward pass (FACTS 3.3).

The first copy of a sequence is masked with probability 1 - alpha_t and weighted 1/t; the second is masked
exactly where the first is not, so with probability alpha_t, and weighted (1-e)/alpha_t; both are halved. The
published weight of the second is 1/(1-t), whose mean diverges at t = 1 (FACTS 3.4). Weighting by the true
probability makes both terms estimate the NELBO: the mean loss is that of the `bounded` form in
`objectives.pgm`.
"""

from __future__ import annotations

import numpy as np
import torch

from pgm_scale.config import ComplementaryMDLMObjectiveConfig, MDLMObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import bernoulli_mask
from pgm_scale.diffusion.schedule import LogLinearSchedule
from pgm_scale.objectives.base import DrawSpec, LossTerms, ModelCall, Objective, scorable, training_times
from pgm_scale.objectives.mdlm import MaskedInputs, MDLMObjective, masked_inputs


class ComplementaryMDLMObjective(Objective):
    """See the module's docstring."""

    is_likelihood = True

    def __init__(self, config: ComplementaryMDLMObjectiveConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.schedule = LogLinearSchedule()
        self._mdlm = MDLMObjective(MDLMObjectiveConfig(minimum_time=config.minimum_time), vocabulary)

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scorable(batch, self.vocabulary).sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> MaskedInputs:
        """2 B rows: all first copies, then all complements."""
        t_B = training_times(batch, spec, self.config.minimum_time)
        probability_B, length = self.schedule.mask_probability(t_B), batch.tokens_BL.shape[1]
        masked_BL = bernoulli_mask(
            spec.seed, batch.sample_numbers_B, "training/partition", probability_B, length
        )
        twice = TokenBatch(
            *(np.concatenate([a, a]) for a in (batch.tokens_BL, batch.valid_BL, batch.sample_numbers_B))
        )
        return masked_inputs(
            twice,
            masked_BL=np.concatenate([masked_BL, ~masked_BL]),
            probability_B=np.concatenate([probability_B, 1 - probability_B]),
            weight_B=np.concatenate([self.schedule.weight(t_B), self.schedule.complement_weight(t_B)]) / 2,
            vocabulary=self.vocabulary,
            sequence_S=np.tile(np.arange(len(t_B)), 2),
        )

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> MaskedInputs:
        """MDLM's bound with MDLM's draws (FACTS 3.3)."""
        return self._mdlm.validation_inputs(batch, spec)

    def call(self, inputs: MaskedInputs) -> ModelCall:
        return self._mdlm.call(inputs)

    def terms(self, nll_SL: torch.Tensor, inputs: MaskedInputs) -> LossTerms:
        return self._mdlm.terms(nll_SL, inputs)
