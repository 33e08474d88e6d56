"""The NLL of one token a hidden state, fused with the output matmul: no [T, V] of logits is ever held.

Rows are taken a chunk at a time: logits, their softmax and, while it is at hand, the gradients. All logits of a
micro-batch are the largest tensors of a training step by far, and on a CPU they are new memory at every step:
holding them took as long as all the rest of the step.

A gradient needs to know what each NLL counts for in the loss. Objectives know it beforehand up to a factor (the
loss is a weighted sum), and the factor comes with the backward pass. Without weights the backward pass computes
the logits a second time, a third more work.

With the vocabulary split over ranks, each has the logits of its range, and they reduce three numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pgm_scale.models.host_matmul import onednn_product, uses_onednn

# Logits of one chunk: 64 MB in fp32 on a CPU, where more does not help (2,048 rows, V 50,258, H 256, forward and
# backward: 0.90 s with chunks of 64 rows, 0.72 s with 128, 0.70 s with 256 to 1,024), and 0.5 GB on a GPU.
_CPU_CHUNK_LOGITS = 1 << 24
_GPU_CHUNK_LOGITS = 1 << 27


def chunk_rows(vocabulary: int, device_type: str) -> int:
    """How many hidden states have their logits made at once, on a rank with that many rows of the vocabulary."""
    limit = _CPU_CHUNK_LOGITS if device_type == "cpu" else _GPU_CHUNK_LOGITS
    return max(1, limit // vocabulary)


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class VocabularyRange:
    """The tokens whose logits this rank computes.

    Attributes:
        first: the token id of the first row of the output linear's weights.
        size: of the whole vocabulary; rows beyond it only pad the range and are never predicted.
        sum, max: reduce a tensor over the ranks that share the vocabulary, in place.
    """

    size: int
    first: int = 0
    sum: Callable[[Tensor], Tensor] = _alone
    max: Callable[[Tensor], Tensor] = _alone


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
        hidden: `[..., H]`. Its gradient is that through this rank's logits: summing it over the ranks is the
            caller's.
        weight_VH, bias_V: this rank's range of the output linear.
        excluded_id: a token of probability 0, or None.
        loss_weights: fp32 `[...]`; the loss must be a multiple of the sum of weights x NLLs. None allows any.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return chunked_nll(
                hidden.to(dtype),
                weight_VH.to(dtype),
                bias_V.to(dtype),
                targets,
                excluded_id,
                loss_weights,
                held,
            )
    arguments = hidden.flatten(0, -2), weight_VH, bias_V
    chunks = _Chunks(targets.flatten(), excluded_id, held)
    if torch.is_grad_enabled():
        loss_weights_T = None if loss_weights is None else loss_weights.flatten()
        nll_T = _ChunkedNLL.apply(*arguments, loss_weights_T, chunks)
    else:
        nll_T, _ = chunks.nll(*arguments)
    return nll_T.view(targets.shape)


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor,
        loss_weights_T: Tensor | None,
        chunks: Any,
    ) -> Tensor:
        ctx.chunks, ctx.loss_weights_T = chunks, loss_weights_T
        nll_T, ctx.gradients = chunks.nll(hidden_TH, weight_VH, bias_V, loss_weights_T)
        if loss_weights_T is None:
            ctx.save_for_backward(hidden_TH, weight_VH, bias_V)
        ctx.dtype = hidden_TH.dtype
        return nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll_T: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.loss_weights_T is None:
            _, gradients = ctx.chunks.nll(*ctx.saved_tensors, d_nll_T)
        else:
            factor = _common_factor(d_nll_T, ctx.loss_weights_T)
            gradients = [gradient.mul_(factor) for gradient in ctx.gradients]
            del ctx.gradients  # scaled in place: a second backward pass must not find them
        return *(gradient.to(ctx.dtype) for gradient in gradients), None, None


def _common_factor(d_nll_T: Tensor, loss_weights_T: Tensor) -> Tensor:
    """What the loss weights are to be multiplied with, read off the heaviest; all the others must agree."""
    heaviest = loss_weights_T.abs().argmax(0, keepdim=True)
    weight, gradient = loss_weights_T.gather(0, heaviest), d_nll_T.gather(0, heaviest)
    factor = torch.where(weight == 0, 0.0, gradient / weight)
    deviation = (d_nll_T - factor * loss_weights_T).abs().amax()
    # A gradient that is not finite is for the training step to find.
    agrees = (deviation <= 1e-4 * gradient.abs()) | ~deviation.isfinite()
    torch._assert_async(agrees.all(), "the loss is not a multiple of the sum of loss weights x NLLs")
    return factor


@dataclass(frozen=True)
class _Chunks:
    """What the computation of one call needs besides tensors with gradients."""

    targets_T: Tensor
    excluded_id: int | None
    held: VocabularyRange

    def nll(
        self, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor, loss_weights_T: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """NLLs `[T]`; given loss weights, also the gradients of their weighted sum: hidden, weight, bias."""
        tokens, vocabulary = len(hidden_TH), len(weight_VH)
        chunk = min(tokens, chunk_rows(vocabulary, hidden_TH.device.type))
        nll_T = hidden_TH.new_empty(tokens, dtype=torch.float32)
        d_hidden_TH = torch.empty_like(hidden_TH)
        d_weight_VH, d_bias_V = (
            torch.zeros_like(x if loss_weights_T is not None else x[:0], dtype=torch.float32)
            for x in (weight_VH, bias_V)
        )
        to_logits, to_hidden = self._products(weight_VH, bias_V, chunk)
        for start in range(0, tokens, max(1, chunk)):
            rows = slice(start, start + chunk)
            hidden_CH = hidden_TH[rows]
            logits_CV = to_logits(hidden_CH).float()
            nll_T[rows], exp_CV, sum_C = self._softmax(logits_CV, self.targets_T[rows])
            if loss_weights_T is None:
                continue
            own_C1, is_own_C1 = self._own(self.targets_T[rows, None], vocabulary)
            weights_C1 = loss_weights_T[rows, None]
            d_logits_CV = exp_CV.mul_(weights_C1 / sum_C[:, None])
            d_logits_CV.scatter_add_(1, own_C1, torch.where(is_own_C1, -weights_C1, 0.0))
            d_bias_V += d_logits_CV.sum(0)
            d_logits_CV = d_logits_CV.to(hidden_TH.dtype)
            d_hidden_TH[rows] = to_hidden(d_logits_CV)
            if d_weight_VH.dtype == hidden_TH.dtype:
                d_weight_VH.addmm_(d_logits_CV.t(), hidden_CH)
            else:
                d_weight_VH += d_logits_CV.t() @ hidden_CH
        return nll_T, [d_hidden_TH, d_weight_VH, d_bias_V]

    @staticmethod
    def _products(
        weight_VH: Tensor, bias_V: Tensor, chunk: int
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """hidden -> logits, into memory that the next chunk overwrites, and the gradients' way back."""
        if uses_onednn(weight_VH):
            # Laid out once for all chunks.
            to_logits, to_hidden = (
                torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), chunk)
                for weight in (weight_VH, weight_VH.t())
            )
            return partial(onednn_product, weight_OI=to_logits, bias_O=bias_V), partial(
                onednn_product, weight_OI=to_hidden
            )
        buffer_CV = weight_VH.new_empty(chunk, len(weight_VH))
        return (
            lambda hidden_CH: torch.addmm(bias_V, hidden_CH, weight_VH.t(), out=buffer_CV[: len(hidden_CH)]),
            lambda d_logits_CV: d_logits_CV @ weight_VH,
        )

    def _softmax(self, logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """NLLs, exp(logits - largest) in the place of the logits, and their sums over the whole vocabulary."""
        vocabulary = logits_CV.shape[1]
        if self.excluded_id is not None and 0 <= self.excluded_id - self.held.first < vocabulary:
            logits_CV[:, self.excluded_id - self.held.first] = -torch.inf
        logits_CV[:, max(0, self.held.size - self.held.first) :] = -torch.inf
        own_C1, is_own_C1 = self._own(targets_C[:, None], vocabulary)
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
