"""The log-linear noise schedule of MDLM and PGM (FACTS 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Time = TypeVar("Time", float, np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class LogLinearSchedule:
    """alpha_t = 1 - (1 - epsilon) t: the probability that a token is still clean at time t in [0, 1].

    Every method is element-wise and keeps the type it is given: float, numpy array or torch tensor.
    """

    epsilon: float = 1e-3

    def mask_probability(self, t: Time) -> Time:
        """1 - alpha_t = (1 - epsilon) t."""
        return (1.0 - self.epsilon) * t

    def alpha(self, t: Time) -> Time:
        return 1.0 - self.mask_probability(t)

    def alpha_derivative(self, t: Time) -> Time:
        """d alpha_t / dt = -(1 - epsilon), in the shape of `t`."""
        return 0.0 * t - (1.0 - self.epsilon)

    def sigma(self, t: Time) -> Time:
        """-log alpha_t, the noise level that time-conditioned models are given; log1p keeps small t exact."""
        minus_mask = -self.mask_probability(t)
        return -(torch.log1p(minus_mask) if isinstance(minus_mask, torch.Tensor) else np.log1p(minus_mask))

    def weight(self, t: Time) -> Time:
        """-alpha'_t / (1 - alpha_t) = 1 / t: the NELBO weight of the tokens masked with 1 - alpha_t."""
        return 1.0 / t

    def complement_weight(self, t: Time) -> Time:
        """-alpha'_t / alpha_t = (1 - epsilon) / alpha_t: the weight of the complement, masked with alpha_t.

        The published weight of the complement is 1 / (1 - t), which exceeds this one by
        epsilon / ((1 - t) alpha_t) and makes the mean of the loss diverge at t = 1 (FACTS 3.4).
        """
        return (1.0 - self.epsilon) / self.alpha(t)
