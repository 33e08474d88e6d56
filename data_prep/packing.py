"""Token lists to rows of one length (FACTS 3.8). Legend: R rows, L length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pgm_scale.data.manifest import Vocabulary, token_dtype_for

Packing = Literal["wrap", "pad"]


def pack(
    packing: Packing, documents: Sequence[Sequence[int]], length_tokens: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens [R, L] in the vocabulary's dtype and the number of valid tokens [R] (uint32) of each."""
    pack_rows = pack_wrapped if packing == "wrap" else pack_padded
    return pack_rows(documents, length_tokens, vocabulary)


def pack_wrapped(
    documents: Sequence[Sequence[int]], length_tokens: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """OpenWebText's packing: every document and an EOS, one after the other, cut into chunks of L - 2, each
    wrapped as BOS + chunk + EOS. What is left at the end (fewer than L - 2 tokens) is dropped."""
    chunk_tokens = length_tokens - 2
    eos = [vocabulary.eos_id]
    dtype = token_dtype_for(vocabulary.size)
    parts = [np.asarray(part, dtype) for document in documents for part in (document, eos)]
    stream = np.concatenate(parts) if parts else np.empty(0, dtype)
    rows = len(stream) // chunk_tokens
    tokens_RL = np.empty((rows, length_tokens), dtype)
    tokens_RL[:, 0] = vocabulary.bos_id
    tokens_RL[:, 1:-1] = stream[: rows * chunk_tokens].reshape(rows, chunk_tokens)
    tokens_RL[:, -1] = vocabulary.eos_id
    return tokens_RL, np.full(rows, length_tokens, np.uint32)


def pack_padded(
    documents: Sequence[Sequence[int]], length_tokens: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """LM1B's packing: a document is one row, BOS + its first L - 2 tokens + EOS + padding that is not valid."""
    assert vocabulary.pad_id is not None
    tokens_RL = np.full((len(documents), length_tokens), vocabulary.pad_id, token_dtype_for(vocabulary.size))
    valid_lengths_R = np.empty(len(documents), np.uint32)
    for row, document in enumerate(documents):
        kept = document[: length_tokens - 2]
        tokens_RL[row, : len(kept) + 2] = [vocabulary.bos_id, *kept, vocabulary.eos_id]
        valid_lengths_R[row] = len(kept) + 2
    return tokens_RL, valid_lengths_R
