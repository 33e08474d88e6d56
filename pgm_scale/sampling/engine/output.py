"""The output layer folded for sampling."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pgm_scale.models.blocks import OutputLayer, modulation
from pgm_scale.models.readout import Readout
from pgm_scale.sampling.engine.folding import FixedNorm
from pgm_scale.sampling.engine.linear import FixedLinear, fixed_linear


class FixedOutput:
    """`OutputLayer` under a constant condition."""

    def __init__(self, layer: OutputLayer, condition: Tensor | None):
        shift, scale = modulation(layer.adaLN_modulation, condition, 2)
        linear: Any = layer.linear
        self.norm = FixedNorm(layer.norm_final, shift, scale)
        self.linear: Any = LogitsLinear(fixed_linear(linear.weight, linear.bias))

    def __call__(self, x_TH: Tensor, readout: Readout, shape: tuple[int, ...] = (-1,)) -> Any:
        return readout(self.norm(x_TH).unflatten(0, shape), self.linear)


class LogitsLinear:
    """fp32 logits: the part of `models.vocabulary.OutputLinear` that sampling calls."""

    def __init__(self, linear: FixedLinear):
        self.linear = linear

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).float()
