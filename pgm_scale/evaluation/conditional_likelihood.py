"""log p(continuation | context) of autoregressive models, and a bound on it of PGM, MDLM and D3PM models.

With n targets and S a set of them, A(S) is the cost of predicting S in one pass from the context and the targets
that are not in S. As in `objectives.pgm`, averaging the chain rule over all orders of the targets bounds -log p by

    sum_{m=1}^{n} (1/m) E_{|S|=m} A(S) = sum over all S of A(S) / (|S| binomial(n, |S|)).

The context is always visible (`conditional`), so only what is asked for is noised. The published harness bounds
the joint log p(context, continuation), which differs by log p(context), the same for all continuations of a
context, but carries the noise of predicting it: `joint` is that form, as a sum over tokens.

All 2^n - 1 sets are summed over where they are no more than the draws: then nothing is random, and with one target
the bound is exact. Else the whole set, which tells whether the prediction is greedy, is taken as it is, and the
others are drawn, their sizes stratified. The draws are a function of (seed, n), so they are equal for all choices
of n tokens.

What comes after the continuation is unknown to every model: not there for a PGM, masked for an MDLM.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import uniform_subset, uniforms
from pgm_scale.errors import UserError
from pgm_scale.evaluation.continuations import Continuation
from pgm_scale.models.autoregressive import AutoregressiveTransformer
from pgm_scale.models.chunking import chunk_rows
from pgm_scale.models.dit import DiffusionTransformer
from pgm_scale.models.partition_transformer import PartitionInputs, PartitionTransformer
from pgm_scale.models.readout import Selected
from pgm_scale.models.segments import Segments
from pgm_scale.models.vocabulary import OutputLinear
from pgm_scale.trained_model import TrainedModel

Bound = Literal["conditional", "joint"]
_LARGEST_MASKED_SHARE = 1 - 1e-4  # the noise level is infinite at 1


@dataclass(frozen=True)
class BoundSettings:
    """At most `draws` sets a continuation."""

    draws: int = 128
    seed: int = 0
    bound: Bound = "conditional"


@dataclass(frozen=True)
class Score:
    """Nats, the sum over the targets; whether each target is the most likely token (see `Row.is_greedy_test`)."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Row:
    """One sequence of a forward pass.

    Attributes:
        number: of the continuation that it belongs to.
        masked_n: bool, which targets are predicted; all of them for an autoregressive model.
        weight: of the NLL of the masked targets in the continuation's.
        is_greedy_test: the continuation is greedy if in this row, which shows no target, every one is the argmax.
    """

    number: int
    continuation: Continuation
    masked_n: np.ndarray
    weight: float
    is_greedy_test: bool


class RowModel(Protocol):
    """How one kind of model scores rows."""

    def __call__(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Of the masked targets of all rows in order: fp32 NLL [Q], and bool [Q] whether it is the argmax."""


class ConditionalLikelihood:
    """Scores continuations, `batch_rows` rows a forward pass; the batch size does not change the scores.

    Attributes:
        method: names what a score is.
    """

    def __init__(
        self, trained: TrainedModel, settings: BoundSettings, batch_rows: int, device: torch.device
    ) -> None:
        """
        Raises:
            UserError: no model of text.
        """
        self._settings, self._batch_rows = settings, batch_rows
        self._is_exact = isinstance(trained.model, AutoregressiveTransformer)
        self._score_rows = row_model(trained.model, trained.description.vocabulary, device)
        self.method = "exact" if self._is_exact else f"any-order bound, {settings.bound}"

    def __call__(self, continuations: Iterable[Continuation]) -> Iterator[Score]:
        """One score after the other, in their order."""
        numbered = enumerate(continuations)
        rows = itertools.chain.from_iterable(self._rows(number, item) for number, item in numbered)
        for _, scored in itertools.groupby(self._scored(rows), key=lambda item: item[0].number):
            parts = list(scored)
            nll = sum(row.weight * row_nll for row, row_nll, _ in parts if row.weight)  # 0 times inf is NaN
            yield Score(-nll, all(is_best for row, _, is_best in parts if row.is_greedy_test))

    def _scored(self, rows: Iterator[Row]) -> Iterator[tuple[Row, float, bool]]:
        while batch := list(itertools.islice(rows, self._batch_rows)):
            with torch.inference_mode():
                nll_Q, is_best_Q = self._score_rows(batch)
            ends = np.cumsum([row.masked_n.sum() for row in batch])[:-1]
            nll_parts = np.split(nll_Q.double().cpu().numpy(), ends)
            best_parts = np.split(is_best_Q.cpu().numpy(), ends)
            for row, nll, is_best in zip(batch, nll_parts, best_parts, strict=True):
                yield row, float(nll.sum()), bool(is_best.all())

    def _rows(self, number: int, continuation: Continuation) -> Iterator[Row]:
        all_n = np.ones(len(continuation.targets), bool)
        if self._is_exact:
            yield Row(number, continuation, all_n, 1.0, True)
            return
        if self._settings.bound == "joint":
            yield Row(number, continuation, all_n, 0.0, True)
            bos, *known = continuation.context
            continuation = Continuation([bos], known + continuation.targets)
        masks = weighted_masks(len(continuation.targets), self._settings)
        for masked_n, weight in masks:
            is_test = self._settings.bound == "conditional" and bool(masked_n.all())
            yield Row(number, continuation, masked_n, weight, is_test)


def weighted_masks(n: int, settings: BoundSettings) -> list[tuple[np.ndarray, float]]:
    """Sets of n targets, bool [n], and their weights: all sets, or an unbiased draw; the whole set comes first."""
    if 2**n - 1 <= settings.draws:
        subsets = itertools.product((True, False), repeat=n)
        masks = [np.array(subset) for subset in subsets if any(subset)]
        return [(masked_n, 1 / (masked_n.sum() * math.comb(n, int(masked_n.sum())))) for masked_n in masks]
    drawn, stream = max(1, settings.draws - 1), f"evaluation/conditional/{n}"
    # Systematic: sizes 1 to n - 1, each drawn equally often but for one.
    shift = uniforms(settings.seed, np.zeros(1, np.int64), f"{stream}/size", 1)[0, 0]
    size_D = 1 + np.floor((n - 1) * (np.arange(drawn) + shift) / drawn).astype(np.int64)
    masked_Dn = uniform_subset(settings.seed, np.arange(drawn), stream, size_D, n)
    weight_D = (n - 1) / (drawn * size_D)
    return [(np.ones(n, bool), 1 / n), *zip(masked_Dn, weight_D.tolist(), strict=True)]


@dataclass(frozen=True)
class TargetScores:
    """A readout: fp32 NLL of one target a hidden state, and whether it is the argmax; the mask is no candidate."""

    targets_Q: Tensor
    vocabulary: Vocabulary

    def __call__(self, hidden_QH: Tensor, output_linear: OutputLinear) -> tuple[Tensor, Tensor]:
        chunk = chunk_rows(self.vocabulary.size, hidden_QH.device.type)
        nll, is_best = [], []
        for hidden_CH, targets_C in zip(hidden_QH.split(chunk), self.targets_Q.split(chunk), strict=True):
            logits_CV = output_linear(hidden_CH)
            logits_CV[:, self.vocabulary.mask_id] = -torch.inf
            target_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
            nll.append(logits_CV.logsumexp(dim=1) - target_C)
            is_best.append(logits_CV.argmax(dim=1) == targets_C)
        return torch.cat(nll), torch.cat(is_best)


def row_model(model: Any, vocabulary: Vocabulary, device: torch.device) -> RowModel:
    """How to score rows with a model.

    Raises:
        UserError: no model of text.
    """
    if isinstance(model, PartitionTransformer) and not model.config.num_classes:
        return PartitionRows(model, vocabulary, device)
    if isinstance(model, DiffusionTransformer):
        return MaskedRows(model, vocabulary, model.length, device)
    if isinstance(model, AutoregressiveTransformer):
        return AutoregressiveRows(model, vocabulary, device)
    raise UserError(f"a {type(model).__name__} of images scores no text; give a model of text")


def _targets(rows: list[Row], device: torch.device) -> Tensor:
    """int64 [Q]: the masked targets, row after row."""
    return torch.tensor(
        [token for row in rows for token in itertools.compress(row.continuation.targets, row.masked_n)]
    ).to(device)


@dataclass(frozen=True)
class PartitionRows:
    """A PGM is asked for the masked targets, given the context and the others; later positions do not exist."""

    model: Any
    vocabulary: Vocabulary
    device: torch.device

    def __call__(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        tokens, positions, queries, key_lengths, query_lengths = [], [], [], [], []
        for row in rows:
            context = len(row.continuation.context)
            is_key = np.concatenate([np.ones(context, bool), ~row.masked_n])
            sequence = np.array(row.continuation.context + row.continuation.targets)
            tokens.append(sequence[is_key])
            positions.append(np.flatnonzero(is_key))
            queries.append(np.flatnonzero(~is_key))
            key_lengths.append(len(positions[-1]))
            query_lengths.append(len(queries[-1]))
        inputs = PartitionInputs(
            tokens_T=torch.from_numpy(np.concatenate(tokens)),
            positions_T=torch.from_numpy(np.concatenate(positions)),
            segments=Segments.of(key_lengths),
            query_positions_Q=torch.from_numpy(np.concatenate(queries)),
            query_segments=Segments.of(query_lengths),
        ).to(self.device)
        return self.model(inputs, readout=TargetScores(_targets(rows, self.device), self.vocabulary))


@dataclass(frozen=True)
class MaskedRows:
    """An MDLM or D3PM sees its whole length, masks at the masked targets and at all that comes later."""

    model: Any
    vocabulary: Vocabulary
    length: int
    device: torch.device

    def __call__(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        noisy_BL = np.full((len(rows), self.length), self.vocabulary.mask_id)
        selected = []
        for index, row in enumerate(rows):
            context, targets = row.continuation.context, np.array(row.continuation.targets)
            noisy_BL[index, : len(context)] = context
            shown_n = np.where(row.masked_n, self.vocabulary.mask_id, targets)
            noisy_BL[index, len(context) : len(context) + len(targets)] = shown_n
            selected.append(index * self.length + len(context) + np.flatnonzero(row.masked_n))
        share_B = np.minimum((noisy_BL == self.vocabulary.mask_id).mean(axis=1), _LARGEST_MASKED_SHARE)
        sigma_B = torch.from_numpy(-np.log1p(-share_B)).float().to(self.device)
        selected_Q = torch.from_numpy(np.concatenate(selected)).to(self.device)
        readout = Selected(selected_Q, TargetScores(_targets(rows, self.device), self.vocabulary))
        return self.model(torch.from_numpy(noisy_BL).to(self.device), sigma_B, readout=readout)


@dataclass(frozen=True)
class AutoregressiveRows:
    """Every target from all that precedes it; rows are padded on the right, where nothing looks."""

    model: Any
    vocabulary: Vocabulary
    device: torch.device

    def __call__(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        inputs = [(row.continuation.context + row.continuation.targets)[:-1] for row in rows]
        length = max(map(len, inputs))
        tokens_BL = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in inputs])
        selected = [
            index * length + len(row.continuation.context) - 1 + np.arange(len(row.continuation.targets))
            for index, row in enumerate(rows)
        ]
        selected_Q = torch.from_numpy(np.concatenate(selected)).to(self.device)
        readout = Selected(selected_Q, TargetScores(_targets(rows, self.device), self.vocabulary))
        return self.model(tokens_BL.to(self.device), readout=readout)
