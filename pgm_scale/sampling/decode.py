"""The loop that the masked samplers share: at each step one forward pass, and tokens for its positions.

When a position is decoded never depends on the tokens, so a sampler is a plan (the step of each position) and a
way to predict (which model, on which inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pgm_scale.sampling.batch import SamplingBatch


@dataclass(frozen=True)
class DecodingStep:
    """One forward pass: B is the number of rows that take part, Q the number of tokens to draw.

    Attributes:
        number: the step's number in the plan.
        rows_B: which rows of the batch take part, on the host.
        tokens_BL: int64 on the device; the mask's id at masked positions.
        masked_BL: bool on the host, the positions not decoded yet.
        target_BL: bool on the host, the positions to decode now, a subset of the masked ones.
        uniforms_Q: float64 on the host, for the targets in row-major order.
    """

    number: int
    rows_B: np.ndarray
    tokens_BL: torch.Tensor
    masked_BL: np.ndarray
    target_BL: np.ndarray
    uniforms_Q: np.ndarray


# (model, plain or folded; batch; step) -> drawn tokens int64 [Q], for the targets in row-major order.
Predict = Callable[[Any, SamplingBatch, DecodingStep], torch.Tensor]


def decode(
    model: Any, predict: Predict, batch: SamplingBatch, step_BL: np.ndarray, idle_steps: int = 0
) -> tuple[torch.Tensor, int]:
    """Generate every token at the step that `step_BL` gives it.

    Args:
        step_BL: int64, the step at which a position is decoded; -1 where the token is known.
        idle_steps: so many first steps make their forward pass on all rows, whatever they decode. From there
            on a row takes part only in the steps that decode some of its tokens.

    Returns:
        tokens int64 [B, L] on the device, and the number of forward passes.
    """
    tokens_BL = batch.canvas_BL()
    uniforms_BL = batch.uniforms_BL("token")
    steps = np.union1d(np.arange(idle_steps), step_BL[step_BL >= 0])
    for number in steps.tolist():
        target_BL = step_BL == number
        rows_B = np.flatnonzero(target_BL.any(axis=1) | (number < idle_steps))
        step = DecodingStep(
            number=number,
            rows_B=rows_B,
            tokens_BL=tokens_BL[batch.on_device(rows_B)],
            masked_BL=step_BL[rows_B] >= number,
            target_BL=target_BL[rows_B],
            uniforms_Q=uniforms_BL[target_BL],
        )
        tokens_BL.view(-1)[batch.on_device(np.flatnonzero(target_BL))] = predict(model, batch, step)
    return tokens_BL, len(steps)
