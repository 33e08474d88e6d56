"""Evaluation of a finished or running run from its folder."""

from __future__ import annotations

from typing import Any, Literal

import torch

from pgm_scale.data.storage import SplitStorage
from pgm_scale.evaluation.perplexity import Perplexity
from pgm_scale.evaluation.validation import VALIDATION_SEED, validate, validation_loader
from pgm_scale.loading import load
from pgm_scale.objectives import Objective, build_objective
from pgm_scale.run_folder import RunFolder, check_fits_run


def evaluate_run(
    folder: str,
    split: str | None,
    sequences: int,
    draws: int,
    batch_sequences: int,
    weights: Literal["ema", "weight"],
) -> dict[str, Any]:
    """Perplexity of a run's newest good checkpoint on a split, with all that tells the number apart.

    Objectives without a likelihood have a `loss` instead.

    Raises:
        UserError: no checkpoint, or the split has another tokenizer, vocabulary or length than the run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = load(folder, weights=weights, device=device)
    description, origin = run.description, run.description.origin
    data = RunFolder(folder).config().data
    storage = SplitStorage(split or data.validation, data.cache_folder)
    check_fits_run(storage.manifest, description, storage.split)
    objective = build_objective(description.objective, description.vocabulary, description.model)
    result = validate(
        run.model,
        objective,
        validation_loader(storage),
        sequences=sequences,
        batch_sequences=batch_sequences,
        device=device,
        draws=draws,
    )
    return {
        "run": str(folder),
        "run_id": origin.run_id,
        "step": origin.step,
        "weights": origin.weights,
        "split": storage.split,
        "objective": description.objective.kind,
        "seed": VALIDATION_SEED,
        "draws": draws,
        "precision": "fp32",
        "sequences": result.sequences,
        "tokens": result.tokens,
        **_values(result, objective),
    }


def _values(result: Perplexity, objective: Objective) -> dict[str, float]:
    if not objective.is_likelihood:
        return {"loss": result.nll_nats_per_token, "loss_standard_error": result.standard_error}
    return {
        "nll_nats_per_token": result.nll_nats_per_token,
        "nll_standard_error": result.standard_error,
        "perplexity": result.perplexity,
        "perplexity_standard_error": result.perplexity_standard_error,
    }
