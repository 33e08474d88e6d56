"""The NLL of one token a hidden state, a chunk of rows at a time (`models.chunking`).

With the vocabulary split over ranks they reduce three numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgm_scale.models.chunking import ChunkLoss, VocabularyRange, chunked_losses


def chunked_nll(
    hidden: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    targets: Tensor,
    excluded_id: int | None,
    loss_weights: Tensor | None,
    held: VocabularyRange,
) -> Tensor:
    """fp32 NLL in nats `[...]` of int64 targets `[...]` under softmax(hidden weight^T + bias).

    Args:
        hidden, weight_VH, bias_V, loss_weights: see `chunked_losses`.
        excluded_id: a token of probability 0, or None.
    """
    losses = _TargetNLL(targets.flatten(), excluded_id, held)
    return chunked_losses(losses, hidden, weight_VH, bias_V, loss_weights)


@dataclass(frozen=True)
class _TargetNLL:
    targets_T: Tensor
    excluded_id: int | None
    held: VocabularyRange
    logits_held: int = 1

    def over_chunks(self, loop: Callable[[ChunkLoss], Tensor], rows: int, dtype: torch.dtype) -> Tensor:
        return loop(self._of_chunk)

    def _of_chunk(
        self, rows: slice, logits_CV: Tensor, weights_C1: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        targets_C1 = self.targets_T[rows, None]
        nll_C, exp_CV, sum_C = self._softmax(logits_CV, targets_C1)
        if weights_C1 is None:
            return nll_C, None
        own_C1, is_own_C1 = self._own(targets_C1, logits_CV.shape[1])
        d_logits_CV = exp_CV.mul_(weights_C1 / sum_C[:, None])
        d_logits_CV.scatter_add_(1, own_C1, torch.where(is_own_C1, -weights_C1, 0.0))
        return nll_C, d_logits_CV

    def _softmax(self, logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """NLLs, exp(logits - largest) in the place of the logits, and their sums over the whole vocabulary."""
        self.held.remove(logits_CV, self.excluded_id, -torch.inf)
        own_C1, is_own_C1 = self._own(targets_C1, logits_CV.shape[1])
        target_C = logits_CV.gather(1, own_C1).masked_fill_(~is_own_C1, 0.0)[:, 0]
        largest_C = self.held.max(logits_CV.amax(1))
        exp_CV = logits_CV.sub_(largest_C[:, None]).exp_()
        sum_C, target_C = self.held.sum(torch.stack([exp_CV.sum(1), target_C]))
        return largest_C + sum_C.log() - target_C, exp_CV, sum_C

    def _own(self, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """The targets as rows of this rank's range, 0 for others, and which are its own."""
        rows = targets - self.held.first
        is_own = (rows >= 0) & (rows < vocabulary)
        return rows.masked_fill(~is_own, 0), is_own
