"""A PGM's decoding as a state that rows enter and leave between steps: continuous batching.

`decode.decode` takes a batch from its first to its last step. Here every row is at a step of its own: it joins when
there is a free slot, takes part in each forward pass from there on, and is gone after its last token. Rows may
differ in what they know, in length, in their number of steps, in their rules and seeds, because all that a forward
pass sees of them is segments of one packed tensor. A row's draws depend on (seed, sample number, position) alone,
as in `sampling.sample`, so its tokens do not depend on who is decoded beside it (but for the rounding of matmuls).

A row may be shorter than the model: positions behind its end are never asked for, so they cost nothing, and what is
drawn has the law of these positions when all others are decoded after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgm_scale.config import SamplerConfig
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models.partition_transformer import PartitionInputs, PartitionTransformer
from pgm_scale.models.segments import Segments
from pgm_scale.models.vocabulary import OutputLinear
from pgm_scale.sampling.ancestral import opening_steps
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.categorical import TokenDraw, TokenRules
from pgm_scale.sampling.engine import fold
from pgm_scale.sampling.engine.partition import FoldedPartitionTransformer
from pgm_scale.sampling.engine.ragged import RaggedLayout, rounded_up
from pgm_scale.sampling.pgm_uniform import equal_steps

# `sampler.kind`: at which step each position is decoded.
PLANS = {"pgm_uniform": equal_steps, "pgm_non_uniform": opening_steps}

_CHUNK_QUERIES = 256  # logits are made for this many queries at once, as in `categorical`


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence to complete.

    Attributes:
        known_L: int64, at most as long as the model, -1 where a token is to be generated; position 0 is known.
        config: its kind is one of `PLANS` for a `StepwiseDecoding`.
        label: its class, for a class-conditional model.
    """

    known_L: np.ndarray
    seed: int
    sample_number: int
    config: SamplerConfig
    label: int | None = None


@dataclass(frozen=True)
class Decoded:
    """What one step has made of one row: tokens at positions, and whether they are its last ones."""

    row: Row
    positions: list[int]
    tokens: list[int]
    is_finished: bool


class StepwiseDecoding:
    """Up to `max_rows` rows of one Partition Transformer of text, each at a step of its own.

    Args:
        model: whole, on `device`, in eval mode, and unchanged while this lives.
    """

    def __init__(
        self, model: PartitionTransformer, vocabulary: Vocabulary, max_rows: int, device: torch.device | str
    ) -> None:
        self.model: Any = fold(model)
        self.vocabulary, self.device = vocabulary, torch.device(device)
        self.length = model.length
        # A slot has the tokens and positions of its row in the order of decoding, so the clean ones are a prefix.
        self._tokens_SL = torch.zeros(max_rows, model.length, dtype=torch.int64, device=self.device)
        self._positions_SL = np.zeros((max_rows, model.length), np.int64)
        self._uniforms_SL = np.zeros((max_rows, model.length))
        self._progress: list[_Progress | None] = [None] * max_rows

    @property
    def rows(self) -> list[Row]:
        return [progress.row for progress in self._progress if progress is not None]

    @property
    def next_rows(self) -> list[Row]:
        """Those that the next step works on: all of them."""
        return self.rows

    @property
    def free_slots(self) -> int:
        return self._progress.count(None)

    def join(self, row: Row) -> None:
        """Let a row take part from the next step on; there must be a free slot, and something to generate."""
        slot, length = self._progress.index(None), len(row.known_L)
        batch = SamplingBatch(
            row.known_L[None],
            np.array([row.sample_number]),
            row.seed,
            self.vocabulary,
            row.config,
            self.device,
        )
        step_L = PLANS[row.config.kind](batch)[0]
        order_L = np.argsort(step_L, kind="stable")  # known tokens, whose step is -1, come first
        self._tokens_SL[slot, :length] = batch.canvas_BL()[0, batch.on_device(order_L)]
        self._positions_SL[slot, :length] = order_L
        self._uniforms_SL[slot, :length] = batch.uniforms_BL("token")[0, order_L]
        counts = np.bincount(step_L + 1).cumsum()
        decoded_by = np.unique(counts).tolist()  # a step that decodes nothing is skipped
        self._progress[slot] = _Progress(row, batch.rules, decoded_by)

    def leave(self, row: Row) -> None:
        """Free the slot of a row, if it has one."""
        for slot, progress in enumerate(self._progress):
            if progress is not None and progress.row is row:
                self._progress[slot] = None

    @torch.inference_mode()
    def step(self) -> list[Decoded]:
        """One forward pass: the next tokens of every row.

        A token is the mask where logits were not finite (`categorical.TokenDraw`). Finished rows have left.
        """
        taking_part = [
            (slot, progress) for slot, progress in enumerate(self._progress) if progress is not None
        ]
        if not taking_part:
            return []
        slots_S = np.array([slot for slot, _ in taking_part])
        clean_S, end_S = (
            np.array(counts) for counts in zip(*(p.next_counts for _, p in taking_part), strict=True)
        )
        read_T = _indices(slots_S * self.length, clean_S)
        target_Q = _indices(slots_S * self.length + clean_S, end_S - clean_S)
        positions_Q = self._positions_SL.reshape(-1)[target_Q]
        draw = RowwiseDraw(
            tuple(p.rules for _, p in taking_part),
            end_S - clean_S,
            self._on_device(self._uniforms_SL.reshape(-1)[target_Q]),
        )
        drawn_Q = self._predict(read_T, positions_Q, clean_S, end_S - clean_S, draw)
        self._tokens_SL.view(-1)[self._on_device(target_Q)] = drawn_Q
        ends = np.cumsum(end_S - clean_S)[:-1]
        parts = zip(np.split(positions_Q, ends), np.split(drawn_Q.cpu().numpy(), ends), strict=True)
        return [
            self._advance(slot, progress, positions.tolist(), tokens.tolist())
            for (slot, progress), (positions, tokens) in zip(taking_part, parts, strict=True)
        ]

    def _advance(self, slot: int, progress: _Progress, positions: list[int], tokens: list[int]) -> Decoded:
        progress.step += 1
        if progress.is_finished:
            self._progress[slot] = None
        return Decoded(progress.row, positions, tokens, progress.is_finished)

    def _predict(
        self,
        read_T: np.ndarray,
        positions_Q: np.ndarray,
        clean_S: np.ndarray,
        targets_S: np.ndarray,
        draw: RowwiseDraw,
    ) -> Tensor:
        """Drawn tokens [Q]. A folded model gets rows of padding behind the real ones; they are no one's."""
        is_folded = isinstance(self.model, FoldedPartitionTransformer)
        tokens, queries = ((rounded_up(n) if is_folded else n) for n in (len(read_T), len(positions_Q)))
        read_T = np.pad(read_T, (0, tokens - len(read_T)), mode="edge")
        positions_Q = np.pad(positions_Q, (0, queries - len(positions_Q)))
        tokens_T = self._tokens_SL.view(-1)[self._on_device(read_T)]
        positions_T = self._on_device(self._positions_SL.reshape(-1)[read_T])
        if not is_folded:
            segments, asking = (Segments.of(counts.tolist(), self.device) for counts in (clean_S, targets_S))
            inputs = PartitionInputs(tokens_T, positions_T, segments, self._on_device(positions_Q), asking)
            return self.model(inputs, readout=draw)
        layout = RaggedLayout(clean_S.tolist(), targets_S.tolist(), tokens, queries, self.device)
        encoded_TH, factors_T = self.model.embed(tokens_T), self.model.rotation.table_L[positions_T]
        for block in self.model.encoder:
            encoded_TH = block(encoded_TH, factors_T, layout.attend)
        return self.model.predict(encoded_TH, factors_T, self._on_device(positions_Q), layout, draw)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


@dataclass
class _Progress:
    """Where a row is: after step k, its first `decoded_by[k]` tokens are clean."""

    row: Row
    rules: TokenRules
    decoded_by: list[int]
    step: int = 0

    @property
    def next_counts(self) -> tuple[int, int]:
        return self.decoded_by[self.step], self.decoded_by[self.step + 1]

    @property
    def is_finished(self) -> bool:
        return self.step + 1 == len(self.decoded_by)


@dataclass(frozen=True)
class RowwiseDraw:
    """A readout as `categorical.TokenDraw`, for rows that may differ in their rules.

    Attributes:
        rules_S: of each row; equal ones are applied together.
        targets_S: how many tokens each row draws.
        uniforms_Q: float64 [Q], one a token; hidden states behind the first Q are padding.
    """

    rules_S: tuple[TokenRules, ...]
    targets_S: np.ndarray
    uniforms_Q: Tensor

    def __call__(self, hidden_QH: Tensor, output_linear: OutputLinear) -> Tensor:
        hidden_QH = hidden_QH[: len(self.uniforms_Q)]
        distinct = list(dict.fromkeys(self.rules_S))
        if len(distinct) == 1:
            return TokenDraw(distinct[0], self.uniforms_Q)(hidden_QH, output_linear)
        numbers_Q = np.repeat([distinct.index(rules) for rules in self.rules_S], self.targets_S)
        drawn = []
        for start in range(0, len(numbers_Q), _CHUNK_QUERIES):
            chunk = slice(start, start + _CHUNK_QUERIES)
            draw = TokenDraw(_MixedRules(distinct, numbers_Q[chunk]), self.uniforms_Q[chunk])
            drawn.append(draw(hidden_QH[chunk], output_linear))
        return torch.cat(drawn)


class _MixedRules:
    """`TokenWeights` of logits whose rows fall under different rules."""

    def __init__(self, distinct: Sequence[TokenRules], numbers_Q: np.ndarray) -> None:
        self.distinct, self.numbers_Q = distinct, numbers_Q

    @property
    def mask_id(self) -> int:
        return self.distinct[0].mask_id

    def __call__(self, logits_QV: Tensor) -> Tensor:
        weights_QV = torch.empty_like(logits_QV)
        for number in np.unique(self.numbers_Q):
            own_q = torch.from_numpy(np.flatnonzero(self.numbers_Q == number)).to(logits_QV.device)
            weights_QV[own_q] = self.distinct[number](logits_QV[own_q])
        return weights_QV


def _indices(starts_S: np.ndarray, counts_S: np.ndarray) -> np.ndarray:
    """int64: for each segment, so many consecutive numbers from its start on, one segment behind another."""
    first_S = np.cumsum(counts_S) - counts_S
    return np.repeat(starts_S - first_S, counts_S) + np.arange(counts_S.sum())
