"""The Halton sampler (arXiv 2503.17076; FACTS 2.3): codes in the order of a low-discrepancy sequence.

Codes that are close in the image depend on each other most, so those that are drawn in one step should lie far
apart. The first cells of a Halton sequence are spread evenly over the grid, however many they are.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pgm_scale.diffusion.mask_schedules import decoded_counts
from pgm_scale.errors import UserError
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.categorical import TokenDraw
from pgm_scale.sampling.codes import CodeReader
from pgm_scale.sampling.decode import DecodingStep, decode


def sample_halton(model: Any, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """Codes of images in Halton order, with `sampler.steps` forward passes (fewer where fewer are unknown)."""
    step_BL = halton_steps(batch)
    length = step_BL.shape[1]
    ranks_BL = np.where(batch.unknown_BL, halton_ranks(length), np.arange(length) - length)
    reader = CodeReader(TokenDraw, steps_B=step_BL.max(axis=1) + 1, ranks_BL=ranks_BL)
    if "resampled_tokens" in batch.config.quirks:
        return _decode_resampling(model, reader, batch, step_BL)
    return decode(model, reader, batch, step_BL)


def halton_steps(batch: SamplingBatch) -> np.ndarray:
    """The step at which each position is decoded, int64 [B, L]; -1 where the token is known.

    The N unknown positions of a row are decoded in Halton order in min(`sampler.steps`, N) steps.
    """
    unknown_BL = batch.unknown_BL
    ranks_L = halton_ranks(unknown_BL.shape[1])
    step_BL = np.full(unknown_BL.shape, -1)
    for step_L, unknown_L in zip(step_BL, unknown_BL, strict=True):
        positions_N = np.flatnonzero(unknown_L)
        positions_N = positions_N[np.argsort(ranks_L[positions_N])]
        codes = len(positions_N)
        counts_K = decoded_counts(steps=min(batch.config.steps, codes), codes=codes)
        step_L[positions_N] = np.searchsorted(counts_K, np.arange(codes), side="right")
    return step_BL


@lru_cache(maxsize=8)
def halton_ranks(length: int) -> np.ndarray:
    """int64 [L]: the rank of each position of an image's row in the Halton order; BOS, at position 0, has rank 0.

    Raises:
        UserError: the row is not BOS and a square grid.
    """
    side = math.isqrt(max(length - 1, 0))
    if side * side != length - 1:
        raise UserError(
            f"sampler.kind halton needs rows of BOS and a square grid, not of {length} tokens; use confidence"
        )
    ranks_L = np.zeros(length, np.int64)
    ranks_L[1 + halton_cells(side)] = np.arange(1, length)
    ranks_L.flags.writeable = False  # it is shared
    return ranks_L


def halton_cells(side: int) -> np.ndarray:
    """int64 [side**2]: the cells (row * side + column) of a grid by their first visits.

    Point i = 1, 2, ... is (phi_2(i), phi_3(i)), and visits the cell (floor(phi_2 side), floor(phi_3 side)). It is
    computed in whole numbers: with floats, points on the edge of a cell fall on either side of it.
    """
    points = 2 * side * side
    while True:
        numbers = np.arange(1, points + 1)
        cells = _digit(numbers, 2, side) * side + _digit(numbers, 3, side)
        visited, first_visits = np.unique(cells, return_index=True)
        if len(visited) == side * side:
            return cells[np.sort(first_visits)]
        points *= 2


def _digit(numbers: np.ndarray, base: int, side: int) -> np.ndarray:
    """floor(phi_base(number) * side): the number's digits behind the point, in reverse."""
    mirrored, power = np.zeros_like(numbers), 1
    while numbers.any():
        mirrored, numbers, power = mirrored * base + numbers % base, numbers // base, power * base
    return mirrored * side // power


def _decode_resampling(
    model: Any, reader: CodeReader, batch: SamplingBatch, step_BL: np.ndarray
) -> tuple[torch.Tensor, int]:
    """The quirk "resampled_tokens": each step draws again what a row has decoded before, seeing it (FACTS 8.16)."""
    tokens_BL = batch.canvas_BL()
    steps = range(int(step_BL.max()) + 1)
    for number in steps:
        rows_B = np.flatnonzero((step_BL == number).any(axis=1))
        target_BL = (step_BL >= 0) & (step_BL <= number) & (step_BL == number).any(axis=1, keepdims=True)
        step = DecodingStep(
            number=number,
            rows_B=rows_B,
            tokens_BL=tokens_BL[batch.on_device(rows_B)],
            masked_BL=step_BL[rows_B] >= number,
            target_BL=target_BL[rows_B],
            uniforms_Q=batch.uniforms_BL(f"token.step{number}")[target_BL],
        )
        tokens_BL.view(-1)[batch.on_device(np.flatnonzero(target_BL))] = reader(model, batch, step)
    return tokens_BL, len(steps)
