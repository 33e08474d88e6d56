"""Mean cross-entropy by the share of a sequence that has to be predicted: the loss per time bucket."""

from __future__ import annotations

import numpy as np
import torch

from pgm_scale.objectives.base import LossTerms


class TimeBuckets:
    """Cross-entropy and token sums in equal buckets of the mask fraction, the last one closed at 1.

    `add` only keeps a reference to the batch's cross-entropy on its device; `state` fetches them all at once,
    so a training step never waits for the device.
    """

    def __init__(self, buckets: int = 10) -> None:
        self._sums = np.zeros((2, buckets))  # nats, tokens
        self._pending: list[tuple[torch.Tensor, np.ndarray]] = []

    def add(self, terms: LossTerms) -> None:
        if terms.cross_entropy_S is None:
            return
        buckets = self._sums.shape[1]
        bucket_S = np.minimum((terms.mask_fraction_S * buckets).astype(np.int64), buckets - 1)
        self._pending.append((terms.cross_entropy_S, bucket_S))
        self._sums[1] += np.bincount(bucket_S, weights=terms.scored_tokens_S, minlength=buckets)

    def state(self) -> np.ndarray:
        """float64 [2 * buckets]; the sum of the ranks' states is the state of the whole."""
        if self._pending:
            nats_S = torch.cat([nats for nats, _ in self._pending]).double().cpu().numpy()
            bucket_S = np.concatenate([bucket for _, bucket in self._pending])
            self._sums[0] += np.bincount(bucket_S, weights=nats_S, minlength=self._sums.shape[1])
            self._pending.clear()
        return self._sums.ravel().copy()

    def merge(self, state: np.ndarray) -> None:
        """Add another accumulator's state to this one."""
        self._sums += state.reshape(self._sums.shape)

    def metrics(self) -> dict[str, list[float]]:
        """The `result` as it is logged; nothing if no row with a cross-entropy was added."""
        means = self.result()
        return {} if np.isnan(means).all() else {"cross_entropy_by_mask_fraction": means.tolist()}

    def result(self) -> np.ndarray:
        """float64 [buckets]: nats per token of all that was added and merged, NaN in an empty bucket."""
        self.state()
        nats, tokens = self._sums
        return np.divide(nats, tokens, out=np.full_like(nats, np.nan), where=tokens > 0)
