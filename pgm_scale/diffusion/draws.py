"""Random draws as pure functions of (run seed, global sample number, stream), on the host.

Philox is counter based: the key is (seed, stream) and the counter starts at the sample number, so a sample's
draws never depend on the rank, the micro-batch or the history of the run. Only raw 64-bit words are used:
numpy keeps those fixed for ever, but not what its distributions make of them.
512 sequences of 1024 tokens take about 20 ms of one core for a mask, 50 ms for a subset of given size.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

_WORD = 1 << 64


@lru_cache(maxsize=64)
def _stream_word(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")


def sample_generator(seed: int, sample_number: int, stream: str) -> np.random.Generator:
    """The generator of one sample: the same on every platform, independent between samples and streams."""
    # The sample number is the counter's second word, so two samples meet only after 2**64 blocks of words.
    key = (_stream_word(stream) << 64) | (seed % _WORD)
    return np.random.Generator(np.random.Philox(counter=int(sample_number) << 64, key=key))


def random_words(seed: int, sample_numbers_B: np.ndarray, stream: str, count: int) -> np.ndarray:
    """uint64 [B, count]: the first `count` raw words of each sample's generator."""
    words = np.empty((len(sample_numbers_B), count), np.uint64)
    for row, number in enumerate(sample_numbers_B):
        words[row] = sample_generator(seed, number, stream).bit_generator.random_raw(count)
    return words


def uniforms(seed: int, sample_numbers_B: np.ndarray, stream: str, count: int) -> np.ndarray:
    """float64 [B, count], uniform on the multiples of 2**-53 in [0, 1)."""
    return _unit_interval(random_words(seed, sample_numbers_B, stream, count))


def stratified_uniform(
    seed: int, sample_numbers_B: np.ndarray, global_batch_sequences: int, stream: str
) -> np.ndarray:
    """float64 [B] in [0, 1): u_i = (U_i + i) / n with i = sample number mod n (FACTS 3.1).

    Each global batch of n consecutive sample numbers has exactly one u in each [i/n, (i+1)/n).
    """
    u_B = uniforms(seed, sample_numbers_B, stream, 1)[:, 0]
    stratum_B = np.asarray(sample_numbers_B) % global_batch_sequences
    # U + i can round up to i + 1, at worst to u = 1: stay inside the stratum.
    upper_B = np.nextafter((stratum_B + 1) / global_batch_sequences, 0.0)
    return np.minimum((u_B + stratum_B) / global_batch_sequences, upper_B)


def sequential_uniform(seed: int, sample_numbers_B: np.ndarray, stream: str) -> np.ndarray:
    """float64 [B] in [0, 1), stratified over every aligned block of 2**k sample numbers, for all k at once.

    The van der Corput sequence (the sample number's bits in reverse) with one random digital shift a stream.
    It needs no batch size, so a fixed validation set gets the same times however it is cut into batches.
    """
    shift = random_words(seed, np.zeros(1, np.int64), stream, 1)[0, 0]
    return _unit_interval(_reversed_bits(np.asarray(sample_numbers_B).astype(np.uint64)) ^ shift)


def bernoulli_mask(
    seed: int, sample_numbers_B: np.ndarray, stream: str, probability_B: np.ndarray, length: int
) -> np.ndarray:
    """bool [B, L]: each entry of row b is True with `probability_B[b]`, independently."""
    return uniforms(seed, sample_numbers_B, stream, length) < probability_B[:, None]


def uniform_subset(
    seed: int, sample_numbers_B: np.ndarray, stream: str, size_B: np.ndarray, length: int
) -> np.ndarray:
    """bool [B, L]: row b is True on a uniformly drawn subset of exactly `size_B[b]` positions."""
    words = random_words(seed, sample_numbers_B, stream, length)
    order = np.argsort(words, axis=1, kind="stable")  # stable: ties fall alike on every platform
    subset = np.empty((len(words), length), bool)
    np.put_along_axis(subset, order, np.arange(length) < size_B[:, None], axis=1)
    return subset


def _unit_interval(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)) * 2.0**-53


def _reversed_bits(words: np.ndarray) -> np.ndarray:
    """uint64 with the order of its 64 bits reversed: swap neighbours, then pairs, ... then halves."""
    for width in (1, 2, 4, 8, 16, 32):
        low = np.uint64((_WORD - 1) // ((1 << width) + 1))  # `width` ones, `width` zeros, repeated
        shift = np.uint64(width)
        words = ((words >> shift) & low) | ((words & low) << shift)
    return words
