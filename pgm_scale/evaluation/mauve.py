"""MAUVE (Pillutla et al. 2021) between references and completions, with a judge's features (FACTS 7; SDTT)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pgm_scale.data.manifest import Vocabulary
from pgm_scale.evaluation.completions import Completions
from pgm_scale.evaluation.extra import require
from pgm_scale.evaluation.judges import Judge
from pgm_scale.evaluation.progress import track
from pgm_scale.sampling.output import to_text

SCALING_FACTOR = 5
SEEDS = (1, 2, 3, 4, 5)  # of the clustering


def mauve_score(
    completions: Completions,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    judge: Judge,
    batch_sequences: int,
) -> dict[str, Any]:
    """The mean over completions and clustering seeds, and its standard deviation.

    The feature of a row is the judge's last hidden state at the last of its first T tokens: of the raw tokens where
    the judge has the same ids, else of the text. Each set of one completion a prompt is compared with the
    references.
    """
    compute_mauve = require("mauve", "--mauve").compute_mauve
    is_raw = judge.why_not_shared(tokenizer, vocabulary) is None
    length = min(completions.references_PT.shape[1], judge.max_tokens)

    def features(tokens_PT: np.ndarray, label: str) -> np.ndarray:
        rows = tokens_PT.tolist() if is_raw else judge.encode(to_text(tokens_PT, tokenizer))
        batches = judge.features([row[:length] for row in rows], batch_sequences)
        return np.concatenate(list(track(batches, len(rows), label, len)))

    reference_PH = features(completions.references_PT, "features of the references")
    scores = []
    for number in range(completions.completed_PCT.shape[1]):
        completed_PH = features(completions.completed_PCT[:, number], f"features of completions {number + 1}")
        for seed in SEEDS:
            with _without_stderr():
                result = compute_mauve(
                    p_features=reference_PH,
                    q_features=completed_PH,
                    mauve_scaling_factor=SCALING_FACTOR,
                    seed=seed,
                    verbose=False,
                )
            scores.append(float(result.mauve))
    return {
        "mauve": float(np.mean(scores)),
        "mauve_standard_deviation": float(np.std(scores)),
        "scaling_factor": SCALING_FACTOR,
        "clustering_seeds": list(SEEDS),
        "feature_tokens": length,
        "feature_input": "raw tokens" if is_raw else "text",
        **completions.record,
        "judge": judge.record,
    }


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """For faiss, which warns from C++ of few points a cluster: always, as MAUVE wants a cluster for 10 texts."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
