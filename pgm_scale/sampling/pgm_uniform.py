"""PGM's uniform sampler (paper Algorithm 2): a random order, and the same number of tokens at every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import decode
from pgm_scale.sampling.packed import predict_packed


def sample_uniform(model: Any, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """Decode in a random order with `sampler.steps` forward passes (fewer where fewer tokens are unknown)."""
    return decode(model, predict_packed, batch, equal_steps(batch))


def equal_steps(batch: SamplingBatch) -> np.ndarray:
    """The step at which each position is decoded, int64 [B, L]; -1 where the token is known.

    Each row puts its U unknown positions in random order and cuts that order into min(steps, U) runs whose
    sizes differ by at most one. No step is empty, and `steps` need not divide U: the published sampler needs
    that, and spends a forward pass on nothing when it decodes one token a step (FACTS 8.8).
    """
    unknown_BL = batch.unknown_BL
    order_BL = np.argsort(np.where(unknown_BL, batch.uniforms_BL("order"), 2.0), axis=1, kind="stable")
    rank_BL = np.empty_like(order_BL)
    np.put_along_axis(rank_BL, order_BL, np.arange(unknown_BL.shape[1])[None, :], axis=1)
    unknown_B1 = unknown_BL.sum(axis=1, keepdims=True)
    steps_B1 = np.minimum(batch.config.steps, unknown_B1)
    return np.where(unknown_BL, rank_BL * steps_B1 // np.maximum(unknown_B1, 1), -1)
