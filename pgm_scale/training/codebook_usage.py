"""How much of a codebook training uses: the codes of a VQ model, if the objective counts any."""

from __future__ import annotations

import math

import numpy as np
import torch

from pgm_scale.objectives.base import LossTerms


class CodebookUsage:
    """A histogram of codes; `add` only keeps the sum on its device, so no step waits for it."""

    def __init__(self) -> None:
        self._counts_K: torch.Tensor | None = None

    def add(self, terms: LossTerms) -> None:
        if terms.code_counts_K is not None:
            kept = self._counts_K
            self._counts_K = terms.code_counts_K if kept is None else kept + terms.code_counts_K

    def state(self) -> np.ndarray:
        """float64 [K], which ranks add up; empty, on all of them, if the objective counts no codes."""
        return np.zeros(0) if self._counts_K is None else self._counts_K.double().cpu().numpy()


def usage_metrics(counts_K: np.ndarray) -> dict[str, float]:
    """Of a histogram: the share of the codes that were used, and the perplexity of their frequencies.

    The perplexity is between 1 and K: so many codes, equally frequent, have the same entropy.
    """
    total = counts_K.sum()
    if total == 0:
        return {}
    shares = counts_K[counts_K > 0] / total
    return {
        "codebook_usage": len(shares) / len(counts_K),
        "codebook_perplexity": math.exp(-(shares * np.log(shares)).sum()),
    }
