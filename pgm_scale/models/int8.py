"""Weight-only int8: linears of blocks keep a signed byte a weight and one fp32 scale an output channel.

The scheme is symmetric: weight[o, i] is about scale[o] * byte[o, i] with scale[o] the largest |weight[o, :]| / 127,
so a weight is off by at most scale[o] / 2. Activations keep their type, and a product widens one linear's bytes at
a time: this saves memory, not time. Embedding, output linear and norms stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.models.blocks import CrossAttentionBlock, SelfAttentionBlock
from pgm_scale.models.maskgit import MaskGITBlock
from pgm_scale.models.partition_transformer import GroupSwap

_BLOCKS = (SelfAttentionBlock, CrossAttentionBlock, GroupSwap, MaskGITBlock)
_LARGEST = 127


class Int8Linear(nn.Module):
    """A linear `[..., in]` to `[..., out]` whose weight is int8."""

    weight_OI: Tensor
    scale_O: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight_OI = linear.weight.detach().float()
        # A channel of zeros has a scale of 1, and so stays one.
        largest_O = weight_OI.abs().amax(dim=1)
        scale_O = torch.where(largest_O > 0, largest_O / _LARGEST, 1.0)
        self.register_buffer("weight_OI", (weight_OI / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale_O", scale_O)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # Bytes up to 127 are exact in every floating-point type; the scales act on the product, in fp32.
        product = F.linear(x, self.weight_OI.to(x.dtype)).float() * self.scale_O
        if self.bias is not None:
            product = product + self.bias.float()
        return product.to(x.dtype)


def quantize_blocks(model: nn.Module) -> None:
    """Replace every linear of the blocks, in place and one at a time."""
    for block in [module for module in model.modules() if isinstance(module, _BLOCKS)]:
        for parent in list(block.modules()):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, Int8Linear(linear))


def is_quantized(model: Any) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.modules())
