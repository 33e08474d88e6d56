"""The likelihood of splits under a trained model: validation perplexity, and zero-shot that of other data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.evaluation.perplexity import Perplexity
from pgm_scale.evaluation.record import Precision, model_record
from pgm_scale.evaluation.validation import VALIDATION_SEED, validate, validation_loader
from pgm_scale.model_folder import is_model_folder
from pgm_scale.objectives import Objective, build_objective
from pgm_scale.run_folder import RunFolder, check_fits_run
from pgm_scale.trained_model import TrainedModel

NO_SPLITS = "none"


@dataclass(frozen=True)
class LikelihoodSettings:
    """How much of a split is scored, and with how many fixed draws of time and mask a sequence."""

    sequences: int = 2048
    draws: int = 1
    batch_sequences: int = 32


def open_splits(folder: str, splits: list[str] | None, cache_folder: str | None) -> list[SplitStorage]:
    """The splits to score: the given ones, or a run's validation split; `none` is no split.

    Raises:
        UserError: a split that cannot be read.
    """
    if splits == [NO_SPLITS] or (not splits and is_model_folder(folder)):
        return []
    if is_model_folder(folder):
        return [SplitStorage(split, cache_folder) for split in splits or []]
    data = RunFolder(folder).config().data
    return [SplitStorage(split, cache_folder or data.cache_folder) for split in splits or [data.validation]]


def check_splits(splits: list[SplitStorage], trained: TrainedModel) -> None:
    """Refuse, before anything is computed, splits of another tokenizer, vocabulary or length.

    Raises:
        UserError: one line, which says what differs.
    """
    for storage in splits:
        description = trained.description
        if description.tokenizer_sha256 is None:  # foreign weights, of which nobody can say it
            description = replace(description, tokenizer_sha256=storage.manifest.tokenizer_sha256)
        try:
            check_fits_run(storage.manifest, description, storage.split)
        except UserError as error:
            what = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise UserError(
                f"{storage.split} does not fit {trained.folder}: {what}; prepare it with the model's tokenizer.json"
            ) from None


def score_split(
    trained: TrainedModel,
    storage: SplitStorage,
    settings: LikelihoodSettings,
    precision: Precision,
    device: torch.device,
) -> dict[str, Any]:
    """NLL and perplexity of a split, or a bound on them; of objectives without a likelihood the `loss`."""
    description = trained.description
    objective = build_objective(description.objective, description.vocabulary, description.model)
    result = validate(
        trained.model,
        objective,
        validation_loader(storage),
        sequences=settings.sequences,
        batch_sequences=settings.batch_sequences,
        device=device,
        draws=settings.draws,
    )
    return {
        **model_record(trained, precision),
        "split": storage.split,
        "seed": VALIDATION_SEED,
        "draws": settings.draws,
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
