"""Generative perplexity of samples under a judge, in the three published forms (FACTS 7; PGM paper; SDTT).

retokenised_first_chunk: the samples' text in the judge's tokens, padded with EOS or cut to L. A target counts if
    the tokens up to it hold exactly one EOS, or if it is no EOS; the last target is dropped, as the data end in an
    EOS. The name is the published one: samples begin with BOS, which is mostly the EOS, so that the rule does not
    stop at the end of the first document but leaves out the EOS between later ones, and the padding.
raw_tokens: the samples' own ids, all targets but the last. Only for a judge with the same token ids.
per_sample_mean: the samples' own ids, all targets; the exponential of the mean over samples of a sample's mean.

The first two are exp(sum of NLL / number of targets) over all samples, and all samples count: no remainder of a
batch is dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pgm_scale.data.manifest import Vocabulary
from pgm_scale.evaluation.judges import Judge
from pgm_scale.evaluation.perplexity import PerplexityAccumulator
from pgm_scale.evaluation.progress import track
from pgm_scale.sampling.output import to_text
from pgm_scale.sampling.statistics import unigram_entropy


def generative_perplexity(
    tokens_BL: np.ndarray, tokenizer: Tokenizer, vocabulary: Vocabulary, judge: Judge, batch_sequences: int
) -> dict[str, Any]:
    """All forms by name, and the samples' unigram entropy, without which they mean nothing (FACTS 8.24).

    A form that the judge cannot give has `perplexity` None and a `reason`.
    """
    return {
        "unigram_entropy_nats": unigram_entropy(tokens_BL),
        "retokenised_first_chunk": _retokenised(tokens_BL, tokenizer, judge, batch_sequences),
        **_of_raw_tokens(tokens_BL, tokenizer, vocabulary, judge, batch_sequences),
        "judge": judge.record,
    }


def retokenise(texts: list[str], judge: Judge, length_tokens: int) -> np.ndarray:
    """int64 [B, L]: the texts in the judge's tokens, cut to L or padded with its EOS."""
    tokens_BL = np.full((len(texts), length_tokens), judge.eos_id, np.int64)
    for row_L, tokens in zip(tokens_BL, judge.encode(texts), strict=True):
        row_L[: len(tokens)] = tokens[:length_tokens]
    return tokens_BL


def first_chunk_targets(tokens_BL: np.ndarray, eos_id: int) -> np.ndarray:
    """bool [B, L - 1]: which of the targets, tokens 1 to L - 1, the published form scores."""
    is_eos_BL = tokens_BL == eos_id
    scored_BL = (is_eos_BL.cumsum(axis=1) == 1) | ~is_eos_BL
    return _without_last(scored_BL[:, 1:])


def all_but_last_target(tokens_BL: np.ndarray) -> np.ndarray:
    """bool [B, L - 1]."""
    return _without_last(np.ones((len(tokens_BL), tokens_BL.shape[1] - 1), bool))


def _without_last(scored: np.ndarray) -> np.ndarray:
    scored[:, -1] = False
    return scored


def _retokenised(
    tokens_BL: np.ndarray, tokenizer: Tokenizer, judge: Judge, batch_sequences: int
) -> dict[str, Any]:
    length = min(tokens_BL.shape[1], judge.max_tokens)
    judged_BL = retokenise(to_text(tokens_BL, tokenizer), judge, length)
    nll_BL = _nll(judge, judged_BL, batch_sequences, "judge, retokenised")
    return _ratio(nll_BL, first_chunk_targets(judged_BL, judge.eos_id)) | {"length_tokens": length}


def _of_raw_tokens(
    tokens_BL: np.ndarray, tokenizer: Tokenizer, vocabulary: Vocabulary, judge: Judge, batch_sequences: int
) -> dict[str, dict[str, Any]]:
    reason = judge.why_not_shared(tokenizer, vocabulary)
    if reason is None and tokens_BL.shape[1] > judge.max_tokens:
        reason = f"samples have {tokens_BL.shape[1]} tokens, the judge takes {judge.max_tokens}"
    if reason is not None:
        return {name: {"perplexity": None, "reason": reason} for name in ("raw_tokens", "per_sample_mean")}
    nll_BL = _nll(judge, tokens_BL, batch_sequences, "judge, raw tokens")
    means_B1 = nll_BL.mean(axis=1, keepdims=True)
    length = {"length_tokens": tokens_BL.shape[1]}
    return {
        "raw_tokens": _ratio(nll_BL, all_but_last_target(tokens_BL)) | length,
        "per_sample_mean": _ratio(means_B1, np.ones_like(means_B1, bool)) | length | {"tokens": nll_BL.size},
    }


def _nll(judge: Judge, tokens_BL: np.ndarray, batch_sequences: int, label: str) -> np.ndarray:
    """float64 [B, L - 1]."""
    batches = track(judge.token_nll(tokens_BL, batch_sequences), len(tokens_BL), label, len)
    return np.concatenate([nll_bL.astype(np.float64) for nll_bL in batches])


def _ratio(nll_BL: np.ndarray, scored_BL: np.ndarray) -> dict[str, Any]:
    accumulator = PerplexityAccumulator()
    accumulator.add(np.where(scored_BL, nll_BL, 0.0).sum(axis=1), scored_BL.sum(axis=1))
    result = accumulator.result()
    return {
        "perplexity": result.perplexity,
        "perplexity_standard_error": result.perplexity_standard_error,
        "nll_nats_per_token": result.nll_nats_per_token,
        "nll_standard_error": result.standard_error,
        "tokens": result.tokens,
    }
