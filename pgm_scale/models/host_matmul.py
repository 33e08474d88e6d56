"""fp32 products on a CPU that torch's own way leaves slow: on one that is not Intel's, and with GELU behind them.

torch multiplies with MKL, which does not use all of another maker's CPU: 210 GFLOP/s where oneDNN reached 480 on
two cores. On Intel's both reach the same (310 to 320), and MKL needs no other layout, so the plain path stays
there. The maker decides, not a measurement: a run that goes on must round as it did before.

oneDNN lays a weight out anew for each product; that is why the gradient of a weight, a product of two activations,
gains less than the others.

Without gradients oneDNN also takes GELU into the product, on every CPU: torch's tanh form takes 2 ns a number. A
product of [744, 256] x [256, 1024] with GELU takes 3.7 instead of 12.9 ms on one core, without it 3.0.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@cache
def onednn_is_faster() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        makers = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "vendor_id" in line]
    except OSError:
        return False
    return bool(makers) and "GenuineIntel" not in makers[0]


def uses_onednn(x: Tensor) -> bool:
    """Whether products with x go through oneDNN."""
    is_fp32_here = x.device.type == "cpu" and x.dtype == torch.float32
    return is_fp32_here and onednn_is_faster() and not torch.is_autocast_enabled("cpu")


def fuses_gelu(x: Tensor) -> bool:
    """Whether a product with x may take GELU too: nothing asks for gradients, and no autocast is passed by."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 2
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias `[T, O]`; no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")


class HostLinear(nn.Linear):
    """`nn.Linear` over `[T, in]`."""

    def forward(self, x: Tensor, with_gelu: bool = False) -> Tensor:
        """`[T, out]`; `with_gelu` also takes GELU, tanh form, of it, which needs `fuses_gelu(x)`.

        Not a method of its own: ZeRO-3 gathers the weights for a call of the module.
        """
        if with_gelu:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
        if x.dim() == 2 and uses_onednn(x):
            return _OneDNNLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return onednn_product(x_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            onednn_product(d_y_TO, weight_OI.t()) if needs_x else None,
            onednn_product(d_y_TO.t(), x_TI.t()) if needs_weight else None,
            d_y_TO.sum(0) if needs_bias else None,
        )
