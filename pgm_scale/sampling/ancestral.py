"""MDLM's ancestral sampler on full-length inputs (FACTS 4), with and without the cache.

Going from time t to s, ancestral sampling opens each masked position independently with probability
(alpha_s - alpha_t) / (1 - alpha_t), and draws its token from p_theta. Whether a position opens never depends
on the tokens, so one uniform a position decides its step at the start, and logits are made only where a token
is drawn: the law is the same, and the cost of drawing falls from L to the opened positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pgm_scale.diffusion.schedule import LogLinearSchedule
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import DecodingStep, decode

_SCHEDULE = LogLinearSchedule()


def sample_ancestral(model: nn.Module, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """One forward pass a step, as published, even where nothing opens.

    These are `sampler.steps` passes, and one more if a token (1e-5 of them) is still masked at the end.
    """
    return decode(model, predict_full_length, batch, opening_steps(batch), idle_steps=batch.config.steps)


def sample_ancestral_cached(model: nn.Module, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """The same tokens as `sample_ancestral`, without the forward passes whose prediction nothing uses.

    The published cache keeps p_theta while no token of the batch changed. Here a row is evaluated only at the
    steps that open some of its positions, which also holds for time-conditioned models.
    """
    return decode(model, predict_full_length, batch, opening_steps(batch))


def time_grid(steps: int) -> np.ndarray:
    """float64 [steps + 1]: the times between the steps, from 1 to 1e-5."""
    return np.linspace(1.0, 1e-5, steps + 1)


def opening_steps(batch: SamplingBatch) -> np.ndarray:
    """The step at which ancestral sampling opens each position, int64 [B, L]; -1 where the token is known.

    A position is still masked after step k with probability prod_j (1 - alpha_{t_j+1}) / (1 - alpha_{t_j}),
    which telescopes to (1 - alpha_{t_k+1}) / (1 - alpha_1): inverting that with one uniform gives its step. What
    is masked at the end of the grid opens in step number `steps`, the published "noise removal".
    """
    masked_K = _SCHEDULE.mask_probability(time_grid(batch.config.steps))
    opened_by_K = 1.0 - masked_K[1:] / masked_K[0]
    step_BL = np.searchsorted(opened_by_K, batch.uniforms_BL("order"), side="right")
    return np.where(batch.unknown_BL, step_BL, -1)


def predict_full_length(model: nn.Module, batch: SamplingBatch, step: DecodingStep) -> torch.Tensor:
    """A `Predict` for `DiffusionTransformer`: all L positions go through the model."""
    draw = batch.draw(step.uniforms_Q, np.flatnonzero(step.target_BL))
    sigma = _SCHEDULE.sigma(float(time_grid(batch.config.steps)[step.number]))
    return model(step.tokens_BL, sigma_batch(sigma, step.tokens_BL), readout=draw)


def sigma_batch(sigma: float, tokens_BL: torch.Tensor) -> torch.Tensor:
    """The noise level of every row, float32 [B], for models that are conditioned on time."""
    return torch.full((len(tokens_BL),), float(sigma), dtype=torch.float32, device=tokens_BL.device)
