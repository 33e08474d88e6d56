"""Exponential moving average of the weights, in fp32, cut as ZeRO cuts the optimizer's state.

It costs 4 bytes a parameter divided by the data-parallel ranks (ZeRO-1 to 3).
"""

from __future__ import annotations

import torch

from pgm_scale.parallel.state import ParameterState


class ExponentialMovingAverage:
    """Averages this rank's ranges of the weights; `values[i]` lies beside `state[i]`.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over updates n (FACTS 6.1).
    """

    def __init__(self, state: list[ParameterState], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.state = state
        self.values = [entry.weight.detach().clone() for entry in state]

    def restart(self) -> None:
        """As if averaging began with the weights as they are now."""
        self.updates = 0
        for values, entry in zip(self.values, self.state, strict=True):
            values.copy_(entry.weight)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer update; one fused pass over this rank's share."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.values:
            torch._foreach_lerp_(self.values, [entry.weight for entry in self.state], 1.0 - decay)
