"""SEDD's analytic (Tweedie) sampler for the absorbing state (FACTS 4; arXiv 2310.16834, section 4.2).

With the scores of a masked diffusion model the joint law works out as that of ancestral sampling: a masked
token stays with (1 - alpha_s) / (1 - alpha_t), and an opened one never changes. It is written in the form of the
scores, and draws at every masked position at every step, as an independent check of the ancestral samplers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pgm_scale.diffusion.schedule import LogLinearSchedule
from pgm_scale.sampling.ancestral import sigma_batch, time_grid
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.categorical import TokenDraw, TokenRules

_SCHEDULE = LogLinearSchedule()


@dataclass(frozen=True)
class AnalyticWeights:
    """Weights of a masked token's next state, the mask among them, going from noise `sigma` down by `delta`.

    The score of token y is alpha / (1 - alpha) p_theta(y), that of the mask is 1. The staggered score is
    e^delta score, plus (1 - e^delta) sum(score) at the mask; it is multiplied by the transition, 1 - e^-delta
    everywhere plus e^-delta at the mask.
    """

    rules: TokenRules
    sigma: float
    delta: float

    @property
    def mask_id(self) -> int:
        return self.rules.mask_id

    def __call__(self, logits_QV: torch.Tensor) -> torch.Tensor:
        weights_QV = self.rules(logits_QV).double()
        odds = 1.0 / math.expm1(self.sigma)  # alpha / (1 - alpha)
        score_QV = weights_QV.mul_(odds / weights_QV.sum(dim=-1, keepdim=True))
        total_score = odds + 1.0
        staggered_QV = score_QV.mul_(math.exp(self.delta) * -math.expm1(-self.delta))
        staggered_mask = math.exp(self.delta) - math.expm1(self.delta) * total_score
        staggered_QV[:, self.rules.mask_id] = max(
            staggered_mask, 0.0
        )  # it is 0 up to rounding at sigma = delta
        return staggered_QV


def sample_analytic(model: nn.Module, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """`sampler.steps` forward passes, and one more that opens whatever is still masked."""
    tokens_BL = batch.canvas_BL()
    mask_id = batch.vocabulary.mask_id
    times = time_grid(batch.config.steps).tolist()
    forward_passes = 0
    for number, (time, next_time) in enumerate(zip(times, [*times[1:], None], strict=True)):
        masked_rows_Q = np.flatnonzero((tokens_BL == mask_id).cpu().numpy())
        if not len(masked_rows_Q):
            break
        sigma = float(_SCHEDULE.sigma(time))
        uniforms_BL = batch.uniforms_BL(f"token.step{number}")
        rows_Q = batch.on_device(masked_rows_Q)
        uniforms_Q = batch.on_device(uniforms_BL.reshape(-1)[masked_rows_Q])
        weights: AnalyticWeights | TokenRules = batch.rules
        if next_time is not None:
            weights = AnalyticWeights(batch.rules, sigma, sigma - float(_SCHEDULE.sigma(next_time)))
        drawn_Q = model(
            tokens_BL, sigma_batch(sigma, tokens_BL), readout=TokenDraw(weights, uniforms_Q, rows_Q)
        )
        tokens_BL.view(-1)[rows_Q] = drawn_Q
        forward_passes += 1
    return tokens_BL, forward_passes
