"""Mean and covariance of features that come in pieces, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pgm_scale.errors import UserError


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance needs to know of a set of images.

    Attributes:
        mean_F: float64.
        covariance_FF: float64, the unbiased estimate (divided by count - 1).
        count: of images; None where a file of statistics does not say.
    """

    mean_F: np.ndarray
    covariance_FF: np.ndarray
    count: int | None


class MomentsAccumulator:
    """Count, mean and sum of squared deviations; two of them merge exactly, up to rounding (Chan et al. 1979).

    Deviations are taken from each piece's own mean, so that a large mean costs no digits.
    """

    def __init__(self, dimension: int) -> None:
        self._count = 0
        self._mean_F = np.zeros(dimension)
        self._squares_FF = np.zeros((dimension, dimension))

    def add(self, features_BF: np.ndarray) -> None:
        piece = MomentsAccumulator(features_BF.shape[1])
        if len(features_BF):
            piece._count = len(features_BF)
            piece._mean_F = features_BF.mean(axis=0, dtype=np.float64)
            deviations_BF = features_BF - piece._mean_F
            piece._squares_FF = deviations_BF.T @ deviations_BF
        self.merge(piece)

    def merge(self, other: MomentsAccumulator) -> None:
        """Take in what another one has seen. The order of merges decides the last bits."""
        total = self._count + other._count
        if total == 0:
            return
        shift_F = other._mean_F - self._mean_F
        self._mean_F = self._mean_F + shift_F * (other._count / total)
        between = self._count * other._count / total
        self._squares_FF = self._squares_FF + other._squares_FF + between * np.outer(shift_F, shift_F)
        self._count = total

    def result(self) -> Moments:
        """Raises: UserError: fewer than two images, which have no covariance."""
        if self._count < 2:
            raise UserError(f"{self._count} image(s) have no covariance; give at least 2, better thousands")
        return Moments(self._mean_F, self._squares_FF / (self._count - 1), self._count)
