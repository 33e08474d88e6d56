"""Clip, AdamW and EMA with torch's defaults of old: one kernel a tensor and operation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class PerTensorUpdate:
    """What a training step does after the backward pass.

    Attributes:
        average: the EMA of each parameter, in their order; its decay warms up as (1 + n) / (10 + n).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        max_norm: float,
        ema_decay: float,
    ) -> None:
        self.parameters = list(parameters)
        self.max_norm, self.ema_decay, self.updates = max_norm, ema_decay, 0
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=betas,
            eps=epsilon,
            weight_decay=weight_decay,
            foreach=False,
            fused=False,
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def step(self) -> None:
        """One update from the gradients, which are clipped in place and kept."""
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=False)
        self.adamw.step()
        self.updates += 1
        decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.sub_((1 - decay) * (average - parameter))
