"""The confidence sampler (MaskGIT, arXiv 2202.04200; FACTS 2.3): draw every unknown code, keep the surest ones.

How sure a draw is: its log-probability plus Gumbel noise, which cools to 0 over the steps. When a code is kept
depends on the tokens, so the loop is not `decode`'s, and each step waits for its draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pgm_scale.diffusion.mask_schedules import shown_codes
from pgm_scale.models.maskgit import MaskGITTransformer
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.categorical import ScoredTokenDraw
from pgm_scale.sampling.codes import CodeReader
from pgm_scale.sampling.decode import DecodingStep


def sample_confidence(model: Any, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """Codes of images, the surest ones of all unknown ones first, with at most `sampler.steps` forward passes.

    A step that keeps nothing makes no pass, as nothing would come of it: MaskGIT's first one.
    """
    has_dropout = "dropout" in batch.config.quirks
    if not has_dropout:
        return _decode(model, batch)
    devices = [batch.device] if batch.device.type == "cuda" else []
    with torch.random.fork_rng(
        devices
    ):  # what is dropped depends on the batch, as it did in the published sampler
        torch.manual_seed(batch.seed + int(batch.sample_numbers_B[0]))
        model.train()
        tokens_BL, passes = _decode(model, batch)
        model.eval()
    return tokens_BL, passes


def _decode(model: Any, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    unknown_B = batch.unknown_BL.sum(axis=1)
    steps_B = np.minimum(batch.config.steps, unknown_B)
    kept_BK = kept_counts(unknown_B, steps_B, starts_with_one=not isinstance(model, MaskGITTransformer))
    length = batch.known_BL.shape[1]
    masked_BL = batch.unknown_BL
    ranks_BL = np.where(masked_BL, 0, -length) + np.arange(length)
    reader = CodeReader(ScoredTokenDraw, steps_B, ranks_BL)
    tokens_BL = batch.canvas_BL()
    steps = np.flatnonzero(kept_BK.any(axis=0))
    for number in steps.tolist():
        rows_B = np.flatnonzero(kept_BK[:, number])
        target_bL = masked_BL[rows_B]
        uniforms_BL = batch.uniforms_BL(f"token.step{number}")
        step = DecodingStep(
            number=number,
            rows_B=rows_B,
            tokens_BL=tokens_BL[batch.on_device(rows_B)],
            masked_BL=target_bL,
            target_BL=target_bL,
            uniforms_Q=uniforms_BL[rows_B][target_bL],
        )
        drawn_2Q = reader(model, batch, step).cpu().numpy()
        confidence_bL = np.full(target_bL.shape, -np.inf)
        confidence_bL[target_bL] = drawn_2Q[1]
        confidence_bL += choice_noise(batch, number, steps_B)[rows_B]
        chosen_bL = surest(confidence_bL, target_bL, kept_BK[rows_B, number])
        chosen_BL = np.zeros_like(masked_BL)
        chosen_BL[rows_B] = chosen_bL
        tokens_Q = batch.on_device(drawn_2Q[0].astype(np.int64)[chosen_bL[target_bL]])
        tokens_BL.view(-1)[batch.on_device(np.flatnonzero(chosen_BL))] = tokens_Q
        masked_BL &= ~chosen_BL
        ranks_BL[chosen_BL] += length * (number + 1)
    return tokens_BL, len(steps)


def kept_counts(unknown_B: np.ndarray, steps_B: np.ndarray, starts_with_one: bool) -> np.ndarray:
    """int64 [B, K]: how many codes each row keeps at each step; all N of a row in the end.

    After step k of a row's K these are floor(N (1 - (2/pi) arccos(k / (K - 1)))), as published: none after the
    first one. `starts_with_one` keeps one code there, as PGM's sampler does, and one less at the last.
    """
    kept_BK = np.zeros((len(unknown_B), max(steps_B.max(), 1)), np.int64)
    for kept_K, codes, steps in zip(kept_BK, unknown_B, steps_B, strict=True):
        after_K = np.minimum(shown_codes(codes, np.linspace(0.0, 1.0, steps)) + starts_with_one, codes)
        after_K[-1:] = codes  # also where one step is the first and the last
        kept_K[:steps] = np.diff(after_K, prepend=0)
    return kept_BK


def choice_noise(batch: SamplingBatch, step: int, steps_B: np.ndarray) -> np.ndarray:
    """float64 [B, L]: Gumbel noise times `sampler.choice_temperature`, times what falls from 1 to 0 over the steps.

    A function of (seed, sample number, step, position) alone.
    """
    share_B = 1.0 - step / np.maximum(steps_B - 1, 1)
    uniforms_BL = np.maximum(batch.uniforms_BL(f"choice.step{step}"), 2.0**-54)  # a 0 would be infinite noise
    return batch.config.choice_temperature * share_B[:, None] * -np.log(-np.log(uniforms_BL))


def surest(confidence_BL: np.ndarray, candidate_BL: np.ndarray, count_B: np.ndarray) -> np.ndarray:
    """bool [B, L]: the `count_B` candidates with the highest confidence; of equal ones the first positions."""
    order_BL = np.lexsort((-confidence_BL, ~candidate_BL), axis=1)
    chosen_BL = np.empty(candidate_BL.shape, bool)
    np.put_along_axis(chosen_BL, order_BL, np.arange(order_BL.shape[1]) < count_B[:, None], axis=1)
    return chosen_BL
