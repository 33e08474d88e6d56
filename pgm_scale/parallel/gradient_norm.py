"""The norm of all gradients in one pass at the speed of memory.

The plain version is `torch.nn.utils.get_total_norm`. On a CPU its kernel reads at a third of the memory's rate (its
loop waits for its own sum), BLAS's dot product at the full one. It sums in fp32: hence blocks, summed up in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_BLOCK_ELEMENTS = 1 << 20


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of fp32 tensors on one device, as if they were one vector; not finite if any element is not."""
    if any(gradient.device.type != "cpu" for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    blocks = [block for gradient in gradients for block in gradient.reshape(-1).split(_BLOCK_ELEMENTS)]
    squared = sum(float(torch.dot(block, block)) for block in blocks)
    return torch.tensor(squared, dtype=torch.float64).sqrt()
