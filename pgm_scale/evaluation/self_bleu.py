"""Self-BLEU (Zhu et al. 2018): how alike the completions of one prompt are; lower is more diverse."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pgm_scale.errors import UserError
from pgm_scale.evaluation.completions import Completions
from pgm_scale.evaluation.extra import require
from pgm_scale.evaluation.progress import track
from pgm_scale.sampling.output import to_text


def check_self_bleu(completions: int) -> None:
    """Refuse, before anything is generated, what cannot be.

    Raises:
        UserError: fewer than two completions, or no sacrebleu.
    """
    require("sacrebleu", "--self-bleu")
    if completions < 2:
        raise UserError(
            f"--self-bleu compares the completions of a prompt with each other; --completions {completions} "
            "are too few, give at least 2"
        )


def self_bleu(completions: Completions, tokenizer: Tokenizer) -> dict[str, Any]:
    """Sentence BLEU, 0 to 100, of each completion against the others of its prompt, without the prompt itself.

    The mean over prompts, with its standard error.
    """
    bleu = require("sacrebleu.metrics", "--self-bleu").BLEU(effective_order=True)
    prompt_tokens = completions.record["prompt_tokens"]
    prompts = completions.completed_PCT[:, :, prompt_tokens:]
    scores_P = []
    for tokens_CT in track(prompts, len(prompts), "self-BLEU"):
        texts = to_text(tokens_CT, tokenizer)
        scores = [
            bleu.sentence_score(text, texts[:index] + texts[index + 1 :]).score
            for index, text in enumerate(texts)
        ]
        scores_P.append(np.mean(scores))
    error = np.std(scores_P, ddof=1) / np.sqrt(len(scores_P))
    return {
        "self_bleu": float(np.mean(scores_P)),
        "self_bleu_standard_error": float(error),
        "signature": str(bleu.get_signature()),
        **completions.record,
    }
