"""What becomes of the output layer's hidden states: a function of them and of the output linear.

A readout runs inside the output layer's forward, so that a sharded or tensor-parallel linear is whole where
it is used, and so that a caller can take only what it needs: all logits, or one number a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Readout = Callable[[Tensor, nn.Module], Any]


def logits(hidden: Tensor, output_linear: nn.Module) -> Tensor:
    """fp32 logits `[..., V]` of hidden states `[..., H]`."""
    return output_linear(hidden).float()


@dataclass(frozen=True)
class TokenNLL:
    """fp32 negative log-likelihood of one target a hidden state.

    Attributes:
        targets: int64, the shape of the hidden states without their last dimension.
        excluded_id: a token that is never predicted, the mask: its logit becomes -inf (FACTS 1.7), so the NLL
            of a target equal to it is +inf.
    """

    targets: Tensor
    excluded_id: int | None

    def __call__(self, hidden: Tensor, output_linear: nn.Module) -> Tensor:
        scores = logits(hidden, output_linear)
        if self.excluded_id is not None:
            # Adding leaves the backward pass the identity; the softmax there is 0 already, without a copy of
            # [..., V] that writing into a column would cost.
            removed_V = scores.new_zeros(scores.shape[-1])
            removed_V[self.excluded_id] = -torch.inf
            scores = scores + removed_V
        flat_nll = F.cross_entropy(scores.flatten(0, -2), self.targets.flatten(), reduction="none")
        return flat_nll.view(self.targets.shape)
