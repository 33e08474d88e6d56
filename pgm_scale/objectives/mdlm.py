"""Masked diffusion (MDLM) NELBO, in continuous and in discrete time (FACTS 3.2).

Each token is masked with probability 1 - alpha_t = (1-e) t; a masked token costs -alpha'_t / (1 - alpha_t) =
1/t times its NLL, a visible one nothing (SUBS carries it over). In the notation of `objectives.pgm` the mean
loss is F((1-e) s, 1-e) / (1-s).

With T > 0 steps t is uniform on {1/T, ..., 1} and the weight is the discrete bound's
T (alpha_s - alpha_t) / (1 - alpha_t) with s = t - 1/T, which is 1/t again for a log-linear schedule. The
first step needs no minimum time. `low_variance` trains with weight 1 instead; that is no bound, so validation
keeps 1/t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pgm_scale.config import MDLMObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import bernoulli_mask
from pgm_scale.diffusion.schedule import LogLinearSchedule
from pgm_scale.models.readout import TokenNLL
from pgm_scale.objectives.base import (
    DrawSpec,
    Inputs,
    LossTerms,
    ModelCall,
    Objective,
    Rows,
    finite_targets,
    fp32,
    scorable,
    training_times,
    validation_times,
)


@dataclass(frozen=True)
class MaskedInputs(Inputs):
    """Noisy sequences, one row each, and what to predict where they are masked.

    Attributes:
        noisy_BL: int64 tokens, the mask id where masked.
        sigma_B: fp32 noise level -log(share kept), for time-conditioned models.
        targets_BL: int64 clean tokens.
        scored_BL: bool, masked and scored. Carried, not recovered from `noisy != clean` or the mask id, which
            misfires when the data hold the mask id (FACTS 8.13).
        rows: B rows.
    """

    noisy_BL: torch.Tensor
    sigma_B: torch.Tensor
    targets_BL: torch.Tensor
    scored_BL: torch.Tensor
    rows: Rows


class MDLMObjective(Objective):
    """See the module's docstring."""

    is_likelihood = True

    def __init__(self, config: MDLMObjectiveConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.schedule = LogLinearSchedule()

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scorable(batch, self.vocabulary).sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> MaskedInputs:
        t_B = self._grid(training_times(batch, spec, self._minimum_time))
        weight_B = np.ones_like(t_B) if self.config.loss == "low_variance" else self.schedule.weight(t_B)
        return self._inputs(batch, t_B, weight_B, spec.seed, "training/partition")

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> MaskedInputs:
        t_B = self._grid(validation_times(batch, spec, self._minimum_time))
        return self._inputs(batch, t_B, self.schedule.weight(t_B), spec.seed, "validation/partition")

    def call(self, inputs: MaskedInputs) -> ModelCall:
        """The NLL of each token, the mask's own logit removed (SUBS)."""
        weight_BL = inputs.scored_BL * inputs.rows.weight_S[:, None]
        readout = TokenNLL(inputs.targets_BL, self.vocabulary.mask_id, weight_BL)
        return ModelCall((inputs.noisy_BL, inputs.sigma_B), readout)

    def terms(self, nll_BL: torch.Tensor, inputs: MaskedInputs) -> LossTerms:
        return inputs.rows.terms((nll_BL * inputs.scored_BL).sum(dim=1))

    @property
    def _minimum_time(self) -> float:
        return 0.0 if self.config.diffusion_steps else self.config.minimum_time

    def _grid(self, t_B: np.ndarray) -> np.ndarray:
        """t rounded up to a multiple of 1/T, where time is discrete."""
        steps = self.config.diffusion_steps
        return (np.floor(t_B * steps) + 1) / steps if steps else t_B

    def _inputs(
        self, batch: TokenBatch, t_B: np.ndarray, weight_B: np.ndarray, seed: int, stream: str
    ) -> MaskedInputs:
        probability_B = self.schedule.mask_probability(t_B)
        length = batch.tokens_BL.shape[1]
        masked_BL = bernoulli_mask(seed, batch.sample_numbers_B, stream, probability_B, length)
        return masked_inputs(batch, masked_BL, probability_B, weight_B, self.vocabulary)


def masked_inputs(
    batch: TokenBatch,
    masked_BL: np.ndarray,
    probability_B: np.ndarray,
    weight_B: np.ndarray,
    vocabulary: Vocabulary,
    sequence_S: np.ndarray | None = None,
) -> MaskedInputs:
    """Noise a batch with a mask drawn with `probability_B`; row b is sequence b unless told otherwise."""
    scored = masked_BL & scorable(batch, vocabulary)
    rows = Rows.of(
        weight_S=weight_B,
        scored_tokens_S=scored.sum(axis=1),
        mask_fraction_S=masked_BL.mean(axis=1),
        sequence_S=np.arange(len(masked_BL)) if sequence_S is None else sequence_S,
    )
    return MaskedInputs(
        noisy_BL=torch.from_numpy(np.where(masked_BL, vocabulary.mask_id, batch.tokens_BL)),
        sigma_B=fp32(-np.log1p(-probability_B)),
        targets_BL=torch.from_numpy(finite_targets(batch.tokens_BL, vocabulary)),
        scored_BL=torch.from_numpy(scored),
        rows=rows,
    )
