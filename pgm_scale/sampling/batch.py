"""What a sampler is given: one batch of partly known sequences, and everything random as a pure function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import uniforms
from pgm_scale.sampling.categorical import TokenDraw, TokenRules


@dataclass(frozen=True)
class SamplingBatch:
    """One batch of sequences to complete.

    Attributes:
        known_BL: int64 token ids, -1 where a token is to be generated.
        sample_numbers_B: int64; with the seed they key every random draw of a row, so that its text does not
            depend on the rows beside it.
        labels_B: int64 class of each row, `num_classes` for none; None for models without classes.
    """

    known_BL: np.ndarray
    sample_numbers_B: np.ndarray
    seed: int
    vocabulary: Vocabulary
    config: SamplerConfig
    device: torch.device
    labels_B: np.ndarray | None = None

    @property
    def unknown_BL(self) -> np.ndarray:
        """bool [B, L]: the positions to generate."""
        return self.known_BL < 0

    @property
    def rules(self) -> TokenRules:
        """What may be drawn: not the mask, and in an image not BOS either (FACTS 2.3)."""
        mask_id, bos_id = self.vocabulary.mask_id, self.vocabulary.bos_id
        return TokenRules.of(self.config, (mask_id,) if self.labels_B is None else (mask_id, bos_id))

    def rules_at(self, step: int) -> TokenRules:
        """`rules`, with twice the temperature in the first `sampler.temperature_warmup_steps`."""
        is_warm = step < self.config.temperature_warmup_steps
        return replace(self.rules, temperature=2 * self.config.temperature) if is_warm else self.rules

    def uniforms_BL(self, purpose: str) -> np.ndarray:
        """float64 [B, L] in [0, 1): a function of (seed, sample number, purpose, position) alone."""
        return uniforms(self.seed, self.sample_numbers_B, f"sampling.{purpose}", self.known_BL.shape[1])

    def canvas_BL(self) -> torch.Tensor:
        """int64 [B, L] on the device: the known tokens, and the mask wherever a token is to be generated."""
        filled_BL = np.where(self.unknown_BL, self.vocabulary.mask_id, self.known_BL)
        return self.on_device(filled_BL)

    def draw(self, uniforms_Q: np.ndarray, rows_Q: np.ndarray | None = None) -> TokenDraw:
        """The readout that draws one token for each of the hidden states `rows_Q` (None: all of them)."""
        rows = None if rows_Q is None else self.on_device(rows_Q)
        return TokenDraw(self.rules, self.on_device(uniforms_Q), rows)

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


# (model, plain or folded; batch) -> (tokens int64 [B, L] on the device, number of forward passes)
Sampler = Callable[[Any, SamplingBatch], tuple[torch.Tensor, int]]
