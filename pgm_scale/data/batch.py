"""The batch that goes from the reader to an objective, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenBatch:
    """Some sequences of the global order.

    Attributes:
        tokens_BL: int64 token ids.
        valid_BL: bool, False at padding, which is fed to the model but not scored.
        sample_numbers_B: int64 global sample number of each sequence, counted from the start of the run and
            on across epochs; every random draw of a sequence is keyed by it.
    """

    tokens_BL: np.ndarray
    valid_BL: np.ndarray
    sample_numbers_B: np.ndarray
