"""Left-to-right sampling with a key-value cache (FACTS 4; the published code recomputes every prefix)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pgm_scale.errors import UserError
from pgm_scale.sampling.batch import SamplingBatch


def sample_autoregressive(model: nn.Module, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """One token of every row a forward pass, from the end of the shortest prefix on.

    Prefixes may differ in length: a row takes part from the start and keeps what it knows, so the rows of a
    batch stay in step and share one cache. `sampler.steps` has no effect.

    Raises:
        UserError: a row does not start with a known token, or knows one beyond its prefix.
    """
    prefix_tokens_B = _prefix_lengths(batch)
    autoregressive: Any = model
    rows, length = batch.known_BL.shape
    tokens_BL = batch.canvas_BL()
    unknown_BL = batch.on_device(batch.unknown_BL)
    uniforms_BL = batch.uniforms_BL("token")
    cache = autoregressive.new_cache(rows)
    first = int(prefix_tokens_B.min())
    seen = 0
    for position in range(first, length):
        new_BL = tokens_BL[:, seen:position]
        last_rows_B = np.arange(1, rows + 1) * new_BL.shape[1] - 1
        draw = batch.draw(uniforms_BL[:, position], last_rows_B)
        drawn_B = autoregressive(new_BL, readout=draw, cache=cache)
        tokens_BL[:, position] = torch.where(unknown_BL[:, position], drawn_B, tokens_BL[:, position])
        seen = position
    return tokens_BL, length - first


def _prefix_lengths(batch: SamplingBatch) -> np.ndarray:
    """int64 [B]: how many tokens each row starts with; everything behind them must be unknown."""
    length = batch.known_BL.shape[1]
    prefix_tokens_B = np.where(batch.unknown_BL.any(axis=1), batch.unknown_BL.argmax(axis=1), length)
    if not prefix_tokens_B.all():
        raise UserError(
            "the autoregressive sampler needs a known first token in every row; put BOS at position 0"
        )
    if (prefix_tokens_B != (~batch.unknown_BL).sum(axis=1)).any():
        raise UserError(
            "the autoregressive sampler can only continue a prefix, not infill; sample known tokens behind "
            "unknown ones with a PGM or MDLM"
        )
    return prefix_tokens_B
