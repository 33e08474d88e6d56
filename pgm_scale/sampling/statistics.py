"""What can be said of samples from their tokens alone."""

from __future__ import annotations

import numpy as np


def unigram_entropy(tokens_BL: np.ndarray) -> float:
    """Mean over the rows of the entropy, in nats, of a row's token histogram, BOS included (FACTS 7).

    Report it beside every generative perplexity: repetitive text lowers both.
    """
    entropies = []
    for tokens_L in tokens_BL:
        _, counts = np.unique(tokens_L, return_counts=True)
        shares = counts / counts.sum()
        entropies.append(-(shares * np.log(shares)).sum())
    return float(np.mean(entropies))
