"""Validation of a model on a split: the perplexity bound with fixed draws, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pgm_scale.data.loader import TokenLoader
from pgm_scale.data.order import GlobalOrder
from pgm_scale.data.storage import SplitStorage
from pgm_scale.evaluation.perplexity import Perplexity, PerplexityAccumulator
from pgm_scale.objectives.base import DrawSpec, Objective, loss_terms

# One seed for all runs: the draws of a validation are part of its definition (README, "Evaluation").
VALIDATION_SEED = 0


def validation_loader(storage: SplitStorage) -> TokenLoader:
    """The split in its stored order."""
    return TokenLoader(storage, GlobalOrder(storage.manifest.rows_per_shard, 0, 1, shuffle=False))


def validate(
    model: Callable[..., Any],
    objective: Objective,
    loader: TokenLoader,
    *,
    sequences: int,
    batch_sequences: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    sum_over_ranks: Callable[[np.ndarray], np.ndarray] = lambda values: values,
    draws: int = 1,
) -> Perplexity:
    """Perplexity bound on the first `sequences` of the split, each with `draws` fixed draws of time and mask.

    Collective: every rank makes the same number of forward passes, as ZeRO-3 needs; rows past the end are fed
    but not scored.

    Args:
        model: called by the objective; in eval mode and without gradients.
        sequences: at most this many; fewer if the split is smaller.
        draws: more draws of the same sequences narrow the error that the draws add.
    """
    rows = loader.manifest.rows
    count = min(sequences, rows)
    accumulator = PerplexityAccumulator()
    # A sequence's draws are averaged before it is counted, so that the error is one over sequences.
    for first in range(
        rank * batch_sequences, _round_up(count, batch_sequences * ranks), batch_sequences * ranks
    ):
        numbers_B = np.arange(first, first + batch_sequences)
        batch = loader.read(np.minimum(numbers_B, count - 1))
        batch = replace(batch, valid_BL=batch.valid_BL & (numbers_B < count)[:, None])
        nll_B = np.zeros(batch_sequences)
        for draw in range(draws):
            drawn = replace(batch, sample_numbers_B=numbers_B + (draw << 40))
            spec = DrawSpec(VALIDATION_SEED, batch_sequences)
            with torch.no_grad():
                terms = loss_terms(objective, model, objective.validation_inputs(drawn, spec).to(device))
            loss_S = terms.loss_S.double().cpu().numpy()
            nll_B += np.bincount(terms.sequence_S, weights=loss_S, minlength=batch_sequences) / draws
        accumulator.add_sequences(nll_B, objective.scored_tokens(batch))
    total = PerplexityAccumulator()
    total.merge(sum_over_ranks(accumulator.state()))
    return total.result()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
