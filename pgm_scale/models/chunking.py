"""A loss of each hidden state, fused with the output matmul: no [T, V] of logits is ever held.

Rows are taken a chunk at a time: logits, their losses and, while they are at hand, the gradients. All logits of a
micro-batch are the largest tensors of a training step by far, and on a CPU they are new memory at every step:
holding them took as long as all the rest of the step.

A gradient needs to know what each row counts for in the loss. Objectives know it beforehand up to a factor (the
loss is a weighted sum), and the factor comes with the backward pass. Without weights the backward pass computes
the logits a second time, a third more work.

With the vocabulary split over ranks, each has the logits of its range, and they reduce a few numbers a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

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

    def remove(self, logits_CV: Tensor, excluded_id: int | None, score: float) -> None:
        """Overwrite the logits of the excluded token and of rows that pad the range."""
        if excluded_id is not None and 0 <= excluded_id - self.first < logits_CV.shape[1]:
            logits_CV[:, excluded_id - self.first] = score
        logits_CV[:, max(0, self.size - self.first) :] = score


# Of the rows of a chunk, its fp32 logits `[C, V]`, which it may overwrite, and its loss weights `[C, 1]`: the
# losses `[C]` and, given weights, the gradient of their weighted sum with respect to the logits.
ChunkLoss = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class RowLosses(Protocol):
    """Which loss it is. Its methods run without gradients.

    Attributes:
        logits_held: how many fp32 tensors of the size of a chunk's logits it holds at once.
    """

    @property
    def logits_held(self) -> int: ...

    def over_chunks(self, loop: Callable[[ChunkLoss], Tensor], rows: int, dtype: torch.dtype) -> Tensor:
        """What `loop` returns; it takes all chunks, of at most `rows` rows, whose products are made in `dtype`."""


def chunked_losses(
    losses: RowLosses, hidden: Tensor, weight_VH: Tensor, bias_V: Tensor, loss_weights: Tensor | None
) -> Tensor:
    """fp32 losses `[...]` of the hidden states `[..., H]` under the logits hidden weight^T + bias.

    Args:
        hidden: its gradient is that through this rank's logits: summing it over the ranks is the caller's.
        weight_VH, bias_V: this rank's range of the output linear.
        loss_weights: fp32 `[...]`; what is differentiated must be a multiple of the sum of weights x losses. None
            allows any.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            hidden, weight_VH, bias_V = (x.to(dtype) for x in (hidden, weight_VH, bias_V))
            return chunked_losses(losses, hidden, weight_VH, bias_V, loss_weights)
    arguments = hidden.flatten(0, -2), weight_VH, bias_V
    if torch.is_grad_enabled():
        loss_weights_T = None if loss_weights is None else loss_weights.flatten()
        losses_T = _ChunkedLosses.apply(*arguments, loss_weights_T, losses)
    else:
        losses_T, _ = _computed(losses, *arguments)
    return losses_T.view(hidden.shape[:-1])


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor,
        loss_weights_T: Tensor | None,
        losses: Any,
    ) -> Tensor:
        ctx.losses, ctx.loss_weights_T = losses, loss_weights_T
        losses_T, ctx.gradients = _computed(losses, hidden_TH, weight_VH, bias_V, loss_weights_T)
        if loss_weights_T is None:
            ctx.save_for_backward(hidden_TH, weight_VH, bias_V)
        ctx.dtype = hidden_TH.dtype
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses_T: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.loss_weights_T is None:
            hidden_TH, weight_VH, bias_V = ctx.saved_tensors
            _, gradients = _computed(ctx.losses, hidden_TH, weight_VH, bias_V, d_losses_T)
        else:
            factor = _common_factor(d_losses_T, ctx.loss_weights_T)
            gradients = [gradient.mul_(factor) for gradient in ctx.gradients]
            del ctx.gradients  # scaled in place: a second backward pass must not find them
        return *(gradient.to(ctx.dtype) for gradient in gradients), None, None


def _common_factor(d_losses_T: Tensor, loss_weights_T: Tensor) -> Tensor:
    """What the loss weights are to be multiplied with, read off the heaviest; all the others must agree."""
    if not len(loss_weights_T):  # no row at all, and so no gradient to scale
        return d_losses_T.new_ones(1)
    heaviest = loss_weights_T.abs().argmax(0, keepdim=True)
    weight, gradient = loss_weights_T.gather(0, heaviest), d_losses_T.gather(0, heaviest)
    factor = torch.where(weight == 0, 0.0, gradient / weight)
    deviation = (d_losses_T - factor * loss_weights_T).abs().amax()
    # A gradient that is not finite is for the training step to find.
    agrees = (deviation <= 1e-4 * gradient.abs()) | ~deviation.isfinite()
    torch._assert_async(agrees.all(), "the loss is not a multiple of the sum of loss weights x row losses")
    return factor


def _computed(
    losses: RowLosses,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    loss_weights_T: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Losses `[T]`; given loss weights, also the gradients of their weighted sum: hidden, weight, bias."""
    rows_T = len(hidden_TH)
    chunk = min(rows_T, chunk_rows(losses.logits_held * len(weight_VH), hidden_TH.device.type))
    losses_T = hidden_TH.new_empty(rows_T, dtype=torch.float32)
    d_hidden_TH = torch.empty_like(hidden_TH)
    d_weight_VH, d_bias_V = (
        torch.zeros_like(x if loss_weights_T is not None else x[:0], dtype=torch.float32)
        for x in (weight_VH, bias_V)
    )
    to_logits, to_hidden = output_products(weight_VH, bias_V, chunk)

    def loop(loss: ChunkLoss) -> Tensor:
        for start in range(0, rows_T, max(1, chunk)):
            rows = slice(start, start + chunk)
            hidden_CH = hidden_TH[rows]
            weights_C1 = None if loss_weights_T is None else loss_weights_T[rows, None]
            losses_T[rows], d_logits_CV = loss(rows, to_logits(hidden_CH).float(), weights_C1)
            if d_logits_CV is None:
                continue
            d_bias_V.add_(d_logits_CV.sum(0))
            d_logits_CV = d_logits_CV.to(hidden_TH.dtype)
            d_hidden_TH[rows] = to_hidden(d_logits_CV)
            if d_weight_VH.dtype == hidden_TH.dtype:
                d_weight_VH.addmm_(d_logits_CV.t(), hidden_CH)
            else:
                d_weight_VH.add_(d_logits_CV.t() @ hidden_CH)
        return losses_T

    return losses.over_chunks(loop, chunk, hidden_TH.dtype), [d_hidden_TH, d_weight_VH, d_bias_V]


def output_products(
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
