"""Completions of prompts from a split, on which MAUVE and self-BLEU are computed (FACTS 7; SDTT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.evaluation.samples import Generator
from pgm_scale.evaluation.validation import validation_loader
from pgm_scale.models.dit import DiffusionTransformer
from pgm_scale.sampling import UNKNOWN


@dataclass(frozen=True)
class CompletionSettings:
    """The first tokens of so many rows, BOS included, and how often and how far each is gone on from."""

    prompts: int = 1024
    prompt_tokens: int = 50
    completion_tokens: int = 50
    completions: int = 5


@dataclass(frozen=True)
class Completions:
    """P prompts, C completions of each, T tokens: prompt and completion.

    Attributes:
        references_PT: int64, as the split has them.
        completed_PCT: int64, the same prompts, gone on from by the model.
        record: how they were made, in plain JSON values.
    """

    references_PT: np.ndarray
    completed_PCT: np.ndarray
    record: dict[str, Any]


def complete_prompts(generator: Generator, split: SplitStorage, settings: CompletionSettings) -> Completions:
    """Go on from the first rows of a split that are long enough.

    An MDLM generates rows of its full length, as it was trained, of which the first T tokens are taken; a PGM and
    an autoregressive model need not compute what comes later.

    Raises:
        UserError: T exceeds the model's length, or no row is long enough.
    """
    description = generator.trained.description
    tokens = settings.prompt_tokens + settings.completion_tokens
    if tokens > description.length_tokens:
        raise UserError(
            f"--prompt-tokens {settings.prompt_tokens} and --completion-tokens {settings.completion_tokens} exceed "
            f"the model's {description.length_tokens} tokens; lower them"
        )
    references_PT = _references(split, settings.prompts, tokens)
    is_mdlm = isinstance(generator.trained.model, DiffusionTransformer)
    length = description.length_tokens if is_mdlm else tokens
    known_PL = np.full((len(references_PT), length), UNKNOWN, np.int64)
    known_PL[:, : settings.prompt_tokens] = references_PT[:, : settings.prompt_tokens]
    made = generator.complete(np.repeat(known_PL, settings.completions, axis=0), "completions")
    completed_PCT = made.tokens_BL[:, :tokens].reshape(-1, settings.completions, tokens)
    record = {
        **made.record,
        "reference_split": split.split,
        "prompts": len(references_PT),
        "prompt_tokens": settings.prompt_tokens,
        "completion_tokens": settings.completion_tokens,
        "completions": settings.completions,
    }
    return Completions(references_PT, completed_PCT, record)


def _references(split: SplitStorage, prompts: int, tokens: int) -> np.ndarray:
    loader, chosen, found = validation_loader(split), [], 0
    for start in range(0, split.manifest.rows, 1024):
        batch = loader.read(np.arange(start, min(start + 1024, split.manifest.rows)))
        long_enough_B = batch.valid_BL.sum(axis=1) >= tokens
        chosen.append(batch.tokens_BL[long_enough_B, :tokens])
        found += int(long_enough_B.sum())
        if found >= prompts:
            break
    if found < 2:
        raise UserError(f"{split.split} has {found} rows of at least {tokens} tokens; give a larger split")
    return np.concatenate(chosen)[:prompts]
