"""What becomes of the output layer's hidden states: a function of them and of the output linear.

A readout runs inside the output layer's forward, so that a sharded or tensor-parallel linear is whole where
it is used, and so that a caller can take only what it needs: all logits, or one number a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pgm_scale.models.divergence import DivergenceKind, TeacherOutput
from pgm_scale.models.vocabulary import OutputLinear

# Of (hidden states, output linear); a VQ model, which has neither, calls it with a `models.vq.VQPass`.
Readout = Callable[..., Any]


def logits(hidden: Tensor, output_linear: OutputLinear) -> Tensor:
    """fp32 logits `[..., V]` of hidden states `[..., H]`."""
    return output_linear(hidden)


@dataclass(frozen=True)
class TokenNLL:
    """fp32 negative log-likelihood of one target a hidden state.

    Attributes:
        targets: int64, the shape of the hidden states without their last dimension.
        excluded_id: a token that is never predicted, the mask; None excludes none.
        loss_weights: fp32, the shape of the targets: what each NLL counts for in the loss, up to one factor. With
            them training is faster, and the loss must be what they say; None allows any loss.
    """

    targets: Tensor
    excluded_id: int | None
    loss_weights: Tensor | None = None

    def __call__(self, hidden: Tensor, output_linear: OutputLinear) -> Tensor:
        return output_linear.token_nll(hidden, self.targets, self.excluded_id, self.loss_weights)


@dataclass(frozen=True)
class Selected:
    """Another readout, of some of the hidden states: int64 `rows` of them, their leading dimensions flattened."""

    rows: Tensor
    readout: Readout

    def __call__(self, hidden: Tensor, output_linear: OutputLinear) -> Any:
        return self.readout(hidden.flatten(0, -2)[self.rows], output_linear)


@dataclass(frozen=True)
class TeacherDivergence:
    """fp32 divergence of the tokens' distribution at each hidden state from a teacher's.

    Attributes:
        teacher: its hidden states at the same places, and its output linear.
        kind: which divergence; see `models.divergence.chunked_divergence`.
        excluded_id, loss_weights: as `TokenNLL`'s.
    """

    teacher: TeacherOutput
    kind: DivergenceKind
    excluded_id: int | None
    loss_weights: Tensor | None = None

    def __call__(self, hidden: Tensor, output_linear: OutputLinear) -> Tensor:
        return output_linear.divergence(hidden, self.teacher, self.kind, self.excluded_id, self.loss_weights)


@dataclass(frozen=True)
class TokenLogProbabilities:
    """fp32 log-probabilities `[..., K]` of the tokens `ids`, int64 `[..., K]`, at each hidden state."""

    ids: Tensor

    def __call__(self, hidden: Tensor, output_linear: OutputLinear) -> Tensor:
        return output_linear.log_probabilities(hidden, self.ids)
