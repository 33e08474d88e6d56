"""Whole batches: one sampling call for rows that ask for the same; for models whose rows cannot join midway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import uniforms
from pgm_scale.models.dit import DiffusionTransformer
from pgm_scale.sampling import SAMPLERS, UNKNOWN
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.engine import BatchSampler, batch_sampler
from pgm_scale.sampling.stepwise import Decoded, Row


class Decoding(Protocol):
    """Who turns rows into tokens, step by step; `sampling.stepwise.StepwiseDecoding` is one."""

    @property
    def rows(self) -> list[Row]:
        """Those that have a slot."""

    @property
    def next_rows(self) -> list[Row]:
        """Those that the next step works on."""

    @property
    def free_slots(self) -> int: ...

    def join(self, row: Row) -> None: ...

    def leave(self, row: Row) -> None: ...

    def step(self) -> list[Decoded]: ...


@dataclass(frozen=True)
class SeededBatch(SamplingBatch):
    """A `SamplingBatch` whose rows have seeds of their own."""

    seeds_B: tuple[int, ...] = ()

    def uniforms_BL(self, purpose: str) -> np.ndarray:
        length = self.known_BL.shape[1]
        return np.concatenate(
            [
                uniforms(seed, self.sample_numbers_B[row : row + 1], f"sampling.{purpose}", length)
                for row, seed in enumerate(self.seeds_B)
            ]
        )


class WholeBatches:
    """A `Decoding` whose step takes the oldest row and those that fit to it from their first to their last token.

    Rows fit together if their sampler settings are equal, and they are of any length: an MDLM or D3PM decodes its
    full length, as it was trained, with what is behind a row unknown; an autoregressive model does not look there.
    """

    def __init__(
        self, model: nn.Module, vocabulary: Vocabulary, max_rows: int, device: torch.device | str
    ) -> None:
        self.model, self.vocabulary, self.max_rows = model, vocabulary, max_rows
        self.device = torch.device(device)
        self._rows: list[Row] = []
        self._samplers: dict[str, BatchSampler] = {}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows)

    @property
    def next_rows(self) -> list[Row]:
        return [row for row in self._rows if row.config == self._rows[0].config]

    @property
    def free_slots(self) -> int:
        return self.max_rows - len(self._rows)

    def join(self, row: Row) -> None:
        self._rows.append(row)

    def leave(self, row: Row) -> None:
        self._rows = [other for other in self._rows if other is not row]

    @torch.inference_mode()
    def step(self) -> list[Decoded]:
        rows = self.next_rows
        if not rows:
            return []
        tokens_BL, _ = self._sampler(rows[0].config.kind)(self._batch(rows))
        for row in rows:
            self.leave(row)
        return [
            _decoded(row, tokens_L[: len(row.known_L)])
            for row, tokens_L in zip(rows, tokens_BL.cpu().numpy(), strict=True)
        ]

    def _sampler(self, kind: str) -> BatchSampler:
        if kind not in self._samplers:
            self._samplers[kind] = batch_sampler(SAMPLERS[kind][1], self.model)
        return self._samplers[kind]

    def _batch(self, rows: Sequence[Row]) -> SeededBatch:
        length = max(len(row.known_L) for row in rows)
        if isinstance(self.model, DiffusionTransformer):
            length = self.model.length
        known_BL = np.full((len(rows), length), UNKNOWN, np.int64)
        for known_L, row in zip(known_BL, rows, strict=True):
            known_L[: len(row.known_L)] = row.known_L
        labels = [row.label for row in rows if row.label is not None]
        return SeededBatch(
            known_BL,
            np.array([row.sample_number for row in rows]),
            rows[0].seed,
            self.vocabulary,
            rows[0].config,
            self.device,
            np.array(labels, np.int64) if labels else None,
            tuple(row.seed for row in rows),
        )


def _decoded(row: Row, tokens_L: np.ndarray) -> Decoded:
    positions = np.flatnonzero(row.known_L < 0)
    return Decoded(row, positions.tolist(), tokens_L[positions].tolist(), is_finished=True)
