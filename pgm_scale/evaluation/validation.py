"""Validation of a model on a split: the perplexity bound with fixed draws, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.loader import TokenLoader
from pgm_scale.data.order import GlobalOrder
from pgm_scale.data.storage import SplitStorage
from pgm_scale.evaluation.perplexity import Perplexity, PerplexityAccumulator
from pgm_scale.objectives.base import DrawSpec, Objective, loss_terms

# One seed for all runs: the draws of a validation are part of its definition (README, "Evaluation").
VALIDATION_SEED = 0
# Draws are keyed by sample number: a sequence's next draw is that of a number which no split reaches.
_NEXT_DRAW = 1 << 40


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
        model: called by `loss_terms` alone; in eval mode.
        sequences: at most this many; fewer if the split is smaller.
        rank, ranks: of the data-parallel copies of the model; all ranks of one copy see the same sequences.
        sum_over_ranks: sums a vector over these copies.
        draws: more draws of the same sequences narrow the error that the draws add.
    """
    rows = loader.manifest.rows
    count = min(sequences, rows)
    accumulator = PerplexityAccumulator()
    for first in range(
        rank * batch_sequences, _round_up(count, batch_sequences * ranks), batch_sequences * ranks
    ):
        numbers_B = np.arange(first, first + batch_sequences)
        batch = loader.read(np.minimum(numbers_B, count - 1))
        batch = replace(batch, valid_BL=batch.valid_BL & (numbers_B < count)[:, None])
        # A sequence's draws are averaged before it is counted, so that the error is one over sequences.
        drawn = (replace(batch, sample_numbers_B=numbers_B + draw * _NEXT_DRAW) for draw in range(draws))
        nll_DB = [_nll_of_sequences(model, objective, one_draw, device) for one_draw in drawn]
        accumulator.add(np.mean(nll_DB, axis=0), objective.scored_tokens(batch))
    total = PerplexityAccumulator()
    total.merge(sum_over_ranks(accumulator.state()))
    return total.result()


def validation_metrics(result: Perplexity, objective: Objective) -> dict[str, float]:
    """A validation as it is logged: a perplexity only where the loss is a likelihood's."""
    if not objective.is_likelihood:
        return {
            "validation_loss": result.nll_nats_per_token,
            "validation_loss_standard_error": result.standard_error,
        }
    return {
        "validation_nll": result.nll_nats_per_token,
        "validation_perplexity": result.perplexity,
        "validation_perplexity_standard_error": result.perplexity_standard_error,
    }


def validation_summary(result: Perplexity, objective: Objective) -> str:
    """A validation in words, for the console."""
    if not objective.is_likelihood:
        value = f"loss {result.nll_nats_per_token:.4f} +- {result.standard_error:.4f}"
    else:
        value = f"perplexity {result.perplexity:.2f} +- {result.perplexity_standard_error:.2f}"
    return f"validation {value} on {result.sequences} sequences"


def _nll_of_sequences(
    model: Callable[..., Any], objective: Objective, batch: TokenBatch, device: torch.device
) -> np.ndarray:
    """float64 [B]: the loss of each sequence, of text a bound on its NLL, with the draws of its sample number."""
    spec = DrawSpec(VALIDATION_SEED, len(batch.tokens_BL))
    with torch.no_grad():
        terms = loss_terms(objective, model, objective.validation_inputs(batch, spec).to(device))
    return terms.loss_of_sequences(len(batch.tokens_BL))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
