"""Foreign tensors to a model's parameters, by the format's table, with a line for each key that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pgm_scale.convert.checkpoint import ForeignCheckpoint
from pgm_scale.convert.formats.base import DerivedKey, Format, bare_key
from pgm_scale.errors import UserError

_EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)
_LISTED = 20


def bare_tensors(checkpoint: ForeignCheckpoint) -> dict[str, Tensor]:
    """The tensors by keys without wrappers and prefix.

    Raises:
        UserError: two keys become one.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        if bare_key(key) in tensors:
            raise UserError(
                f"{checkpoint.path}: {key[:200]} is in it twice, but for a prefix; leave one of them out"
            )
        tensors[bare_key(key)] = tensor
    return tensors


def weights_by_name(
    checkpoint: ForeignCheckpoint, table_of: Format, model: Any, use_average: bool, strict: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensor of each parameter of a model, and the unknown keys that were left out.

    Args:
        model: on any device; only its shapes are read.
        use_average: take the EMA, by the order of its list, but see that the raw weights fit too.
        strict: unknown keys are errors.

    Raises:
        UserError: lists all keys that are unknown, missing, of another shape, or not what they are derived from.
    """
    tensors = bare_tensors(checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    table = {bare_key(key): ours for key, ours in table_of.published_keys(list(shapes)).items()}
    derived = [name for name, ours in table.items() if isinstance(ours, DerivedKey)]
    problems = [line for name, shape in shapes.items() if (line := _misfit(name, tensors.get(name), shape))]
    unknown = [f"{name[:200]}: unknown to the model" for name in tensors if name not in table]
    problems += unknown if strict else []
    if not problems:
        for name in derived:
            problems += _underived(table[name], tensors.get(name), model, tensors)
    _raise(checkpoint, table_of, problems, strict)
    weights = {name: tensors[name] for name in shapes}
    if use_average:
        weights = _averaged(checkpoint, table_of, shapes, strict)
    return weights, [] if strict else unknown


def _misfit(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> str:
    """What is wrong with the tensor of this shape; nothing is the empty string."""
    if tensor is None:
        return f"{name}: missing, the model has {shape}"
    if tuple(tensor.shape) != shape:
        return f"{name}: shape {tuple(tensor.shape)}, the model has {shape}"
    if tensor.dtype not in _EXACT_IN_FP32:
        return f"{name}: of type {tensor.dtype}, which fp32 does not hold exactly"
    return ""


def _underived(
    derived: Any, tensor: Tensor | None, model: nn.Module, tensors: Mapping[str, Tensor]
) -> list[str]:
    """Of a key that other tensors tell; old files may not have it."""
    if tensor is None:
        return []
    expected = derived.value(model.config, tensors)
    if problem := _misfit(derived.key, tensor, tuple(expected.shape)):
        return [problem]
    tolerance = derived.tolerance if tensor.dtype == torch.float32 else max(derived.tolerance, 1e-2)
    equal = (
        torch.equal if not derived.tolerance else lambda a, b: torch.allclose(a, b, rtol=tolerance, atol=0.0)
    )
    if equal(tensor.float(), expected.float()):
        return []
    return [f"{derived.key}: not what the model computes for it, so this is another model"]


def _averaged(
    checkpoint: ForeignCheckpoint, table_of: Format, shapes: Mapping[str, tuple[int, ...]], strict: bool
) -> dict[str, Tensor]:
    """The list zipped with the parameters in the order of their registration, shape by shape."""
    average = checkpoint.average
    assert average is not None, "the caller has seen to it"
    if len(average) != len(shapes):
        raise UserError(
            f"{checkpoint.path}: ema.shadow_params has {len(average)} tensors, the model {len(shapes)} parameters; "
            "take the raw weights (--weights weight)"
        )
    pairs = list(zip(shapes.items(), average, strict=True))
    problems = [
        f"ema.shadow_params[{index}], {line}"
        for index, ((name, shape), tensor) in enumerate(pairs)
        if (line := _misfit(name, tensor, shape))
    ]
    _raise(checkpoint, table_of, problems, strict)
    return {name: tensor for (name, _), tensor in pairs}


def _raise(checkpoint: ForeignCheckpoint, table_of: Format, problems: list[str], strict: bool) -> None:
    if problems:
        more = len(problems) - _LISTED
        lines = [*problems[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
        hint = "; --no-strict leaves unknown keys out" if strict else ""
        raise UserError(
            f"{checkpoint.path} does not hold the {table_of.name} model that its shapes tell of{hint}:\n  "
            + "\n  ".join(lines)
        )


def published_tensors(table_of: Format, model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: all published keys in their order, in fp32."""
    held = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    return {
        key: ours.value(model.config, held).clone() if isinstance(ours, DerivedKey) else held[ours]
        for key, ours in table_of.published_keys(list(held)).items()
    }
