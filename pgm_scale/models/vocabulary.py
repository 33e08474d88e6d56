"""The two layers with one row a token: the embedding, and the output linear behind its interface.

Under tensor parallelism a rank holds the logits of a part of the vocabulary only. What a readout may ask of the
output linear is therefore a short list (`OutputLinear`), and most of it needs no logits gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.models.chunked_nll import chunked_nll
from pgm_scale.models.chunking import VocabularyRange
from pgm_scale.models.divergence import DivergenceKind, TeacherOutput, chunked_divergence
from pgm_scale.models.initialization import fill_with, uniform


class VocabularyEmbedding(nn.Module):
    """Token table `[V, H]`, drawn from U(-1/sqrt(H), 1/sqrt(H)) (FACTS 1.6)."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        bound = hidden_size**-0.5
        self.embedding = fill_with(nn.Parameter(torch.empty(vocab_size, hidden_size)), uniform(bound))
        nn.init.uniform_(self.embedding, -bound, bound)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)


class OutputLinear(Protocol):
    """What a readout asks of the output linear; every rank gets the answer for the whole vocabulary."""

    @property
    def weight(self) -> Tensor:
        """`[V, H]`, or this rank's range of it; under ZeRO-3, only inside a call."""

    @property
    def bias(self) -> Tensor:
        """`[V]`, as the weight."""

    def __call__(self, hidden: Tensor, compute: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """fp32 logits `[..., V]` of hidden states `[..., H]`, or what `compute` makes of the hidden states."""

    def token_nll(
        self, hidden: Tensor, targets: Tensor, excluded_id: int | None, loss_weights: Tensor | None
    ) -> Tensor:
        """fp32 NLL in nats `[...]` of int64 targets `[...]`, one for each hidden state `[..., H]`.

        The token `excluded_id` has probability 0: the softmax is over the others (FACTS 1.7), and the NLL of a
        target equal to it is +inf. See `chunked_losses` for the loss weights, fp32 `[...]`.
        """

    def divergence(
        self,
        hidden: Tensor,
        teacher: TeacherOutput,
        kind: DivergenceKind,
        excluded_id: int | None,
        loss_weights: Tensor | None,
    ) -> Tensor:
        """fp32 divergence `[...]` from a teacher, one for each hidden state `[..., H]`: `chunked_divergence`."""

    def log_probabilities(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """fp32 log-probabilities `[..., K]` of the tokens int64 `[..., K]`, no token excluded."""


class VocabularyLinear(nn.Linear):
    """An `OutputLinear` that holds the whole vocabulary.

    Its methods call the module, not its weights, so that ZeRO-3's hooks gather these first.
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size)

    def forward(self, hidden: Tensor, compute: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """fp32 logits, or what `compute` makes of the hidden states while ZeRO-3 has the weights here."""
        return super().forward(hidden).float() if compute is None else compute(hidden)

    def token_nll(
        self, hidden: Tensor, targets: Tensor, excluded_id: int | None, loss_weights: Tensor | None
    ) -> Tensor:
        held = VocabularyRange(self.out_features)
        return self(
            hidden,
            lambda given: chunked_nll(
                given, self.weight, self.bias, targets, excluded_id, loss_weights, held
            ),
        )

    def divergence(
        self,
        hidden: Tensor,
        teacher: TeacherOutput,
        kind: DivergenceKind,
        excluded_id: int | None,
        loss_weights: Tensor | None,
    ) -> Tensor:
        held = VocabularyRange(self.out_features)
        return self(
            hidden,
            lambda given: chunked_divergence(
                given, self.weight, self.bias, teacher, kind, excluded_id, loss_weights, held
            ),
        )

    def log_probabilities(self, hidden: Tensor, ids: Tensor) -> Tensor:
        scores = self(hidden)
        return scores.gather(-1, ids) - scores.logsumexp(dim=-1, keepdim=True)
