"""Initial weights as a function of (seed, parameter name), so that every parallel layout starts from the same.

Layers say how each of their parameters is filled (`fill_with`); the values are drawn for the whole tensor from a
generator of its own, and a tensor-parallel shard takes its slice. So no rank has to build the whole model, and
none depends on what another one draws. The cost is drawing a whole tensor on each of its tensor-parallel ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pgm_scale.tensor_slices import TensorSlice

Fill = Callable[[Tensor, torch.Generator | None], Any]  # without a generator: torch's global one
Weight = TypeVar("Weight", bound=Tensor)  # torch's own layers call their parameters tensors


def fill_with(parameter: Weight, fill: Fill) -> Weight:
    """Remember how to draw the whole tensor that this parameter is, or is a slice of."""
    parameter.fill = fill  # type: ignore[attr-defined]
    return parameter


def initialise(parameter: Weight, fill: Fill) -> Weight:
    """`fill_with`, and fill it now, from torch's global generator."""
    with torch.no_grad():
        fill(parameter, None)
    return fill_with(parameter, fill)


def uniform(bound: float) -> Fill:
    return lambda whole, generator: whole.uniform_(-bound, bound, generator=generator)


def normal(whole: Tensor, generator: torch.Generator | None) -> Tensor:
    return whole.normal_(generator=generator)


def normal_of(deviation: float) -> Fill:
    return lambda whole, generator: whole.normal_(0.0, deviation, generator=generator)


def zeros(whole: Tensor, _: torch.Generator | None) -> Tensor:
    return whole.zero_()


def ones(whole: Tensor, _: torch.Generator | None) -> Tensor:
    return whole.fill_(1.0)


def tensor_slice(parameter: nn.Parameter) -> TensorSlice:
    """Which part of the whole tensor this parameter is; the tensor-parallel layers say so of theirs."""
    return getattr(parameter, "slice", None) or TensorSlice.whole(tuple(parameter.shape))


def note_slices(model: nn.Module) -> None:
    """Write the slice on every parameter, also the whole ones: ZeRO-3 takes their shapes away."""
    for parameter in model.parameters():
        parameter.slice = tensor_slice(parameter)  # type: ignore[attr-defined]


def is_split(parameter: nn.Parameter) -> bool:
    """Whether the tensor-parallel ranks hold parts of it, not the same."""
    return not tensor_slice(parameter).is_whole


def initial_values(name: str, parameter: nn.Parameter, seed: int) -> Tensor:
    """fp32 CPU values of this rank's part; rows that pad a vocabulary are 0."""
    part = tensor_slice(parameter)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    whole = torch.empty(part.global_shape, dtype=torch.float32, device="cpu")
    parameter.fill(whole, generator)  # type: ignore[attr-defined]
    if part.is_whole:
        return whole.view(parameter.shape)
    values = torch.zeros(parameter.numel())
    values[: part.numel] = part.take(whole)
    return values.view(parameter.shape)
