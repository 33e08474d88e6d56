"""A divergence between a student's and a teacher's tokens at each hidden state, a chunk of rows at a time.

With l = log p_s, D a sum over v of f(l_v, log p_t,v), and a_v = df/dl_v, as dl_u/dz_v = [u = v] - p_s,v:
    dD/dz_v = sum_u a_u ([u = v] - p_s,v) = a_v - p_s,v sum_u a_u,
which a_v + c p_s,v in the place of a_v leaves as it is (sum p_s = 1). So reverse KL's a_v may be f itself, and
forward KL's p_s - p_t, whose rounding errors are 0 where the two are equal.

Distributions are over the vocabulary without the excluded token (FACTS 5; section 8.22 for the factor of tvd). With
the vocabulary split over ranks they reduce six numbers a row: two maxima, and four sums in two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pgm_scale.models.chunking import ChunkLoss, VocabularyRange, chunked_losses, output_products

if TYPE_CHECKING:
    from pgm_scale.models.vocabulary import OutputLinear

DivergenceKind = Literal["reverse_kl", "forward_kl", "mse", "tvd"]

# The score of what is never predicted, in student and teacher. Finite, so that their difference is 0; and so large
# that the logarithm of a softmax's sum is lost beside it.
_REMOVED = -1e30


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says at each hidden state of the student.

    Attributes:
        hidden: `[..., H]`, the teacher's own hidden states, the student's in shape but for H.
        output_linear: the teacher's, of the student's class and the same range of the vocabulary.
    """

    hidden: Tensor
    output_linear: OutputLinear


def chunked_divergence(
    hidden: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    teacher: TeacherOutput,
    kind: DivergenceKind,
    excluded_id: int | None,
    loss_weights: Tensor | None,
    held: VocabularyRange,
) -> Tensor:
    """fp32 divergences `[...]` of softmax(hidden weight^T + bias) and the teacher's; its gradient is none.

    reverse_kl is KL(student || teacher) in nats, forward_kl KL(teacher || student), mse the mean over the whole
    vocabulary of (log p_s - log p_t)^2, and tvd half the sum of |p_s - p_t|.

    Args:
        hidden, weight_VH, bias_V, loss_weights: see `chunked_losses`.
        excluded_id: a token of probability 0, or None; mse counts it as a difference of 0.
    """
    losses = _Divergence(teacher, kind, excluded_id, held)
    return chunked_losses(losses, hidden, weight_VH, bias_V, loss_weights)


@dataclass(frozen=True)
class _Divergence:
    teacher: TeacherOutput
    kind: DivergenceKind
    excluded_id: int | None
    held: VocabularyRange
    logits_held: int = 3  # log p_s, log p_t and p_s

    def over_chunks(self, loop: Callable[[ChunkLoss], Tensor], rows: int, dtype: torch.dtype) -> Tensor:
        linear = self.teacher.output_linear

        def compute(hidden: Tensor) -> Tensor:
            weight_VH, bias_V = linear.weight.to(dtype), linear.bias.to(dtype)
            to_logits, _ = output_products(weight_VH, bias_V, rows)
            scratch_CV = hidden.new_empty(rows, len(weight_VH), dtype=torch.float32)
            hidden_TH = hidden.flatten(0, -2).to(dtype)
            return loop(partial(self._of_chunk, hidden_TH, to_logits, scratch_CV))

        return linear(self.teacher.hidden, compute)  # the module's call, in which ZeRO-3 has its weights here

    def _of_chunk(
        self,
        teacher_hidden_TH: Tensor,
        to_teacher_logits: Callable[[Tensor], Tensor],
        scratch_CV: Tensor,
        rows: slice,
        student_CV: Tensor,
        weights_C1: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        teacher_CV = to_teacher_logits(teacher_hidden_TH[rows]).float()
        scratch_CV = scratch_CV[: len(student_CV)]
        self._log_softmax(student_CV, teacher_CV, scratch_CV)
        p_CV = torch.exp(student_CV, out=scratch_CV)
        value_C, a_CV = _KINDS[self.kind](student_CV, teacher_CV, p_CV, self.held.size)
        value_C, sum_C = self.held.sum(torch.stack([value_C, a_CV.sum(1)]))
        if weights_C1 is None:
            return value_C, None
        return value_C, a_CV.addcmul_(p_CV, sum_C[:, None], value=-1).mul_(weights_C1)

    def _log_softmax(self, student_CV: Tensor, teacher_CV: Tensor, scratch_CV: Tensor) -> None:
        """Of both, in the place of their logits."""
        both = student_CV, teacher_CV
        for logits_CV in both:
            self.held.remove(logits_CV, self.excluded_id, _REMOVED)
        largest_2C1 = self.held.max(torch.stack([x.amax(1, keepdim=True) for x in both]))
        sums = [
            torch.sub(logits_CV, largest_C1, out=scratch_CV).exp_().sum(1, keepdim=True)
            for logits_CV, largest_C1 in zip(both, largest_2C1, strict=True)
        ]
        log_sums_2C1 = largest_2C1 + self.held.sum(torch.stack(sums)).log()
        for logits_CV, log_sum_C1 in zip(both, log_sums_2C1, strict=True):
            logits_CV.sub_(log_sum_C1)


# A kind: from log p_s and log p_t, which it overwrites, p_s and the size of the vocabulary, D `[C]` and a `[C, V]`.


def _reverse_kl(log_s: Tensor, log_t: Tensor, p_s: Tensor, size: int) -> tuple[Tensor, Tensor]:
    summands = log_s.sub_(log_t).mul_(p_s)
    return summands.sum(1), summands


def _forward_kl(log_s: Tensor, log_t: Tensor, p_s: Tensor, size: int) -> tuple[Tensor, Tensor]:
    minus_summands, p_t = log_s.sub_(log_t), log_t.exp_()
    return -minus_summands.mul_(p_t).sum(1), torch.sub(p_s, p_t, out=p_t)


def _mse(log_s: Tensor, log_t: Tensor, p_s: Tensor, size: int) -> tuple[Tensor, Tensor]:
    difference = log_s.sub_(log_t)
    return torch.linalg.vector_norm(difference, dim=1).square() / size, difference.mul_(2 / size)


def _tvd(log_s: Tensor, log_t: Tensor, p_s: Tensor, size: int) -> tuple[Tensor, Tensor]:
    difference = torch.sub(p_s, log_t.exp_(), out=log_t)
    return difference.abs().sum(1) / 2, difference.sign_().mul_(p_s).div_(2)


_KINDS: dict[DivergenceKind, Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "mse": _mse,
    "tvd": _tvd,
}
