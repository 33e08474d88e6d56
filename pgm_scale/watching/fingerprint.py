"""A fingerprint of the data that a run was trained on, equal at every layout, micro-batch size and resume."""

from __future__ import annotations

import zlib

import numpy as np

from pgm_scale.data.batch import TokenBatch

# Sums are taken modulo 2**40, so that those of up to 8,192 ranks add up exactly in float64.
MODULUS = 1 << 40


def fingerprint(batch: TokenBatch) -> int:
    """Sum over the sequences of CRC-32(sample number, tokens, and of images the class), modulo `MODULUS`.

    Takes about 5 microseconds for a sequence of 1,024 tokens, in the thread that reads ahead.
    """
    labels_B = batch.labels_B if batch.labels_B is not None else np.empty((len(batch.tokens_BL), 0), np.int64)
    total = 0
    for number, tokens_L, label in zip(batch.sample_numbers_B, batch.tokens_BL, labels_B, strict=True):
        total += zlib.crc32(tokens_L.tobytes(), zlib.crc32(label.tobytes(), zlib.crc32(number.tobytes())))
    return total % MODULUS
