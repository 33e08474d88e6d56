"""D3PM with an absorbing state (FACTS 3.5): T steps, a_t = 1 - t, the network may predict the mask (p_m).

With x = x_theta(x_0), s = t - dt and a_s = 1 - s, the posterior of a masked token keeps the mask with s/t and
becomes x_0 with dt/t; the reverse step, the sum over x~ of q(x_s, x_t = m | x~) x_theta(x~), keeps it with
(s + a_s p_m) / (t + a_t p_m) and becomes x_0 with dt x / (t + a_t p_m). Their KL divergence is

    (dt/t) [log(1 + a_t p_m / t) - log x] + (s/t) [log(1 + a_t p_m / t) - log(1 + a_s p_m / s)],

zero at tokens that are not masked. The bound is T times its mean over the T steps, plus the reconstruction
-log x_theta(x_0) with the clean sequence as input at t = 0, plus `cross_entropy_weight` times -log x while
training. The second bracket, a difference of nearly equal logarithms that T multiplies and 0 * inf at s = 0,
equals

    log(1 - p_m dt / (t (s + a_s p_m))),

which loses nothing in fp32 and is left out at s = 0. t is at most 1 - 1e-4, as the noise level -log a_t is
infinite at 1.

`substitution` is SUBS: the mask's logit is removed (p_m = 0) and visible tokens are carried over, so the
reconstruction is 0 and the loss is T (dt/t) times the NLL of the masked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pgm_scale.config import D3PMObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import bernoulli_mask
from pgm_scale.models.readout import Readout, TokenLogProbabilities, TokenNLL
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

_LATEST_TIME = 1 - 1e-4


@dataclass(frozen=True)
class D3PMInputs(Inputs):
    """Rows 0..B-1 are noisy; without substitution rows B..2B-1 are clean, for the reconstruction.

    Attributes:
        tokens_SL, sigma_S: the model's inputs, S = B or 2 B; sigma is 0 at the clean rows.
        targets_SL: int64 clean tokens.
        masked_BL, scored_BL: bool; the masked tokens that are scored, and all that are.
        t_B1, s_B1: fp32 the noisier and the cleaner time.
        cross_entropy_weight: of -log x_theta(x_0).
        rows: B rows.
    """

    tokens_SL: torch.Tensor
    sigma_S: torch.Tensor
    targets_SL: torch.Tensor
    masked_BL: torch.Tensor
    scored_BL: torch.Tensor
    t_B1: torch.Tensor
    s_B1: torch.Tensor
    cross_entropy_weight: float
    rows: Rows


class D3PMObjective(Objective):
    """See the module's docstring."""

    is_likelihood = True

    def __init__(self, config: D3PMObjectiveConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scorable(batch, self.vocabulary).sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> D3PMInputs:
        u_B = training_times(batch, spec, minimum_time=0.0)
        return self._inputs_at(
            batch, self._step(u_B), spec.seed, "training/partition", self.config.cross_entropy_weight
        )

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> D3PMInputs:
        """The bound alone, without the auxiliary cross-entropy."""
        u_B = validation_times(batch, spec, minimum_time=0.0)
        return self._inputs_at(batch, self._step(u_B), spec.seed, "validation/partition", 0.0)

    def call(self, inputs: D3PMInputs) -> ModelCall:
        """The NLL [B, L] under SUBS; else log x_theta of the target and of the mask, [2 B, L, 2]."""
        readout: Readout
        if self.config.substitution:
            readout = TokenNLL(inputs.targets_SL, self.vocabulary.mask_id, self._weight_BL(inputs))
        else:
            masks_SL = torch.full_like(inputs.targets_SL, self.vocabulary.mask_id)
            readout = TokenLogProbabilities(torch.stack([inputs.targets_SL, masks_SL], dim=-1))
        return ModelCall((inputs.tokens_SL, inputs.sigma_S), readout)

    def terms(self, result: torch.Tensor, inputs: D3PMInputs) -> LossTerms:
        steps = self.config.diffusion_steps
        if self.config.substitution:
            nll_BL = result
            loss_BL = self._weight_BL(inputs) * nll_BL
        else:
            log_target_SL, log_mask_SL = result.unbind(dim=-1)
            nll_BL, reconstruction_BL = (-log_target_SL).chunk(2)
            kl_BL = absorbing_kl(nll_BL, log_mask_SL.chunk(2)[0].exp(), inputs.t_B1, inputs.s_B1)
            loss_BL = steps * kl_BL * inputs.masked_BL
            loss_BL = loss_BL + (reconstruction_BL + inputs.cross_entropy_weight * nll_BL) * inputs.scored_BL
        return inputs.rows.terms((nll_BL * inputs.masked_BL).sum(dim=1), loss_BL.sum(dim=1))

    def _weight_BL(self, inputs: D3PMInputs) -> torch.Tensor:
        """Under SUBS: what each token's NLL counts for in the loss."""
        steps = self.config.diffusion_steps
        weight_B1 = steps * (inputs.t_B1 - inputs.s_B1) / inputs.t_B1 + inputs.cross_entropy_weight
        return weight_B1 * inputs.masked_BL

    def _step(self, u_B: np.ndarray) -> np.ndarray:
        """int64 [B] in 1..T, uniform."""
        return np.floor(u_B * self.config.diffusion_steps).astype(np.int64) + 1

    def _inputs_at(
        self, batch: TokenBatch, step_B: np.ndarray, seed: int, stream: str, cross_entropy_weight: float
    ) -> D3PMInputs:
        """Inputs with each sequence at a given step of 1..T: t = step / T, s = (step - 1) / T."""
        tokens_BL = batch.tokens_BL
        t_B = np.minimum(step_B / self.config.diffusion_steps, _LATEST_TIME)
        s_B = (step_B - 1) / self.config.diffusion_steps
        drawn_BL = bernoulli_mask(seed, batch.sample_numbers_B, stream, t_B, tokens_BL.shape[1])
        noisy_BL = np.where(drawn_BL, self.vocabulary.mask_id, tokens_BL)
        targets_BL, sigma_B = finite_targets(tokens_BL, self.vocabulary), -np.log1p(-t_B)
        scored = scorable(batch, self.vocabulary)
        masked = drawn_BL & scored
        reconstructs = not self.config.substitution
        rows = Rows.of(
            weight_S=np.ones(len(tokens_BL)),
            scored_tokens_S=masked.sum(axis=1),
            mask_fraction_S=drawn_BL.mean(axis=1),
            sequence_S=np.arange(len(tokens_BL)),
        )
        return D3PMInputs(
            tokens_SL=torch.from_numpy(np.concatenate([noisy_BL, tokens_BL]) if reconstructs else noisy_BL),
            sigma_S=fp32(np.concatenate([sigma_B, 0 * sigma_B]) if reconstructs else sigma_B),
            targets_SL=torch.from_numpy(np.tile(targets_BL, (2, 1)) if reconstructs else targets_BL),
            masked_BL=torch.from_numpy(masked),
            scored_BL=torch.from_numpy(scored),
            t_B1=fp32(t_B[:, None]),
            s_B1=fp32(s_B[:, None]),
            cross_entropy_weight=cross_entropy_weight,
            rows=rows,
        )


def absorbing_kl(
    nll: torch.Tensor, mask_probability: torch.Tensor, t: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """KL(q(x_s | x_t = m, x_0) || p_theta(x_s | x_t = m)) in nats; broadcasts, 0 <= s < t <= 1."""
    become = torch.log1p((1 - t) * mask_probability / t) + nll
    # At s = 0 nothing stays masked: a step of 0 makes the second term 0 without a division by it.
    safe_s, stay_step = torch.where(s > 0, s, 1.0), torch.where(s > 0, t - s, 0.0)
    stay = torch.log1p(-mask_probability * stay_step / (t * (safe_s + (1 - safe_s) * mask_probability)))
    return (t - s) / t * become + s / t * stay
