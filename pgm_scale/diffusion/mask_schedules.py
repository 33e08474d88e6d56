"""How much of an image is hidden: the mask schedules of MaskGIT, in training and in sampling (FACTS 2.2, 2.3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pgm_scale.config import MaskSchedule

_RATIOS: dict[MaskSchedule, Callable[[np.ndarray], np.ndarray]] = {
    "arccos": lambda u: 2 / np.pi * np.arccos(u),
    "root": lambda u: 1 - np.sqrt(u),
    "linear": lambda u: 1 - u,
    "square": lambda u: 1 - u**2,
    "cosine": lambda u: np.cos(np.pi / 2 * u),
}


def mask_ratio(schedule: MaskSchedule, u: np.ndarray) -> np.ndarray:
    """float64, from 1 at u = 0 to 0 at u = 1: the probability that a code is hidden; training draws u uniformly."""
    return _RATIOS[schedule](np.asarray(u, np.float64))


def decoded_counts(steps: int, codes: int) -> np.ndarray:
    """int64 [K]: of N codes, how many are decoded after each of K steps, max(k, floor(N (1 - (2/pi) arccos(k/K)))).

    The last count is N; with more steps than codes, each step decodes one until none is left. The arccosine is in
    float64. In float32, as published, single counts of N = 1024 differ by 1 for 28 of the K up to 1024, of which 45
    is the first (333 codes after 22 steps instead of 332); for the published 32 and 64, none does.
    """
    k = np.arange(1, steps + 1)
    return np.minimum(np.maximum(k, shown_codes(codes, k / steps)), codes)


def shown_codes(codes: int, progress: np.ndarray) -> np.ndarray:
    """int64: of N codes, how many the arccos schedule shows at a progress of 0 to 1, rounded down.

    Half-way it is a third of N: the small addend keeps that whole where it is, whatever a platform's arccosine.
    """
    return np.floor(codes * (1 - mask_ratio("arccos", progress)) + 1e-9).astype(np.int64)
