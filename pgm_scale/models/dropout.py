"""Dropout; on a CPU with cheaper random numbers than torch's.

torch spends 12 ns on one drawn boolean there, some 6% of a training step (H 256, L 1024). Here every 64-bit number
of the same generator decides four elements: 4.9 to 2.3 ms a call with product, residual and backward pass. A GPU's
kernel has no such problem. The rate is a multiple of 2^-16, and the scale is that of the rate used, so the mean is
exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16


def attention_with_dropout(q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, rate: float) -> Tensor:
    """Scaled dot-product attention `[B, N, L, D]` of all positions, in which a weight is dropped with `rate`.

    torch's own makes the same matrix of weights on a CPU, when it drops some, but with its slow draws.
    """
    if rate == 0.0 or q_BNLD.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, dropout_p=rate)
    scores_BNLL = (q_BNLD * q_BNLD.shape[-1] ** -0.5) @ k_BNLD.transpose(-2, -1)
    return dropout(scores_BNLL.softmax(dim=-1).to(v_BNLD.dtype), rate, training=True) @ v_BNLD


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """x with each element 0 with probability `rate` and else divided by 1 - rate, drawn from torch's generator."""
    if not training or rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    dropped = round(rate * _LEVELS)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * torch.where(keep, _LEVELS / (_LEVELS - dropped), 0.0).to(x.dtype)
