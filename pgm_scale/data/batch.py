"""Rows as they lie in a shard, and the batch that goes from the reader to an objective, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class ShardRows(NamedTuple):
    """The rows of a shard, in their stored types.

    Attributes:
        tokens_RL: uint8, uint16 or uint32 token ids [rows, length].
        valid_lengths_R: uint32, 1 to length: how many leading tokens of a row are not padding.
        labels_R: uint32, the class of each row; None for text.
    """

    tokens_RL: np.ndarray
    valid_lengths_R: np.ndarray
    labels_R: np.ndarray | None = None


@dataclass(frozen=True)
class TokenBatch:
    """Some sequences of the global order.

    Attributes:
        tokens_BL: int64 token ids.
        valid_BL: bool, False at padding, which is fed to the model but not scored.
        sample_numbers_B: int64 global sample number of each sequence, counted from the start of the run and
            on across epochs; every random draw of a sequence is keyed by it.
        labels_B: int64 class of each sequence; None for text.
    """

    tokens_BL: np.ndarray
    valid_BL: np.ndarray
    sample_numbers_B: np.ndarray
    labels_B: np.ndarray | None = None
