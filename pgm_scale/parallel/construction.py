"""This rank's part of the model, with its initial weights, without any rank ever holding the whole of it.

The modules are made without memory (on the meta device), then filled one parameter at a time from their own
random streams (`models.initialization`); ZeRO-3 takes each parameter apart before the next one is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pgm_scale.config import ModelConfig, ParallelConfig, RunConfig
from pgm_scale.models import build_model
from pgm_scale.models.blocks import CrossAttentionBlock, SelfAttentionBlock
from pgm_scale.models.initialization import initial_values, note_slices
from pgm_scale.models.layers import LOCAL_LAYERS, LayerBuilder, PositionTable
from pgm_scale.models.maskgit import MaskGITBlock
from pgm_scale.models.stages import Span, spans, whole_span
from pgm_scale.parallel.mesh import Mesh


def layer_builder(mesh: Mesh, parallel: ParallelConfig) -> LayerBuilder:
    """Plain layers, or those that the mesh's tensor-parallel ranks share."""
    if mesh.groups is None or mesh.tensor_ranks == 1:
        return LOCAL_LAYERS
    from pgm_scale.parallel.tensor_layers import TensorParallelLayers  # imports megatron

    return TensorParallelLayers(mesh.groups.tensor, parallel.sequence_parallel)


def stage_span(config: ModelConfig, mesh: Mesh, stage_units: Sequence[int]) -> Span:
    """The units of this rank's pipeline stage; `stage_units` counts those of every stage."""
    return spans(stage_units)[mesh.stage] if mesh.stages > 1 else whole_span(config)


def build_own_part(
    config: RunConfig, vocab_size: int, length: int, mesh: Mesh, stage_units: Sequence[int]
) -> tuple[nn.Module, LayerBuilder]:
    """This rank's part of a run's model, without memory, and what made its layers."""
    layers = layer_builder(mesh, config.parallel)
    span = stage_span(config.model, mesh, stage_units)
    return build_part(
        config.model, vocab_size, length, layers, span, config.training.recompute_blocks
    ), layers


def build_part(
    config: ModelConfig, vocab_size: int, length: int, layers: LayerBuilder, span: Span, recomputes: bool
) -> nn.Module:
    """The modules of a span, without memory, whose blocks are computed again in the backward pass or not."""
    with torch.device("meta"):
        model = build_model(config, vocab_size, length, layers, span)
    note_slices(model)
    if recomputes:
        recompute(model)
    return model


def recompute(model: nn.Module) -> None:
    """Keep only the blocks' inputs for the backward pass, which computes the rest again."""
    for module in model.modules():
        if isinstance(module, (SelfAttentionBlock, CrossAttentionBlock, MaskGITBlock)):
            module.forward = _recomputed(module.forward)  # type: ignore[method-assign]


def materialize(
    model: nn.Module,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    place: Callable[[nn.Parameter], None] = lambda _: None,
) -> None:
    """Give every parameter memory and its initial values; `place` is called with each before the next one."""
    give_memory(model, lambda name, empty: initial_values(name, empty, seed).to(device, dtype), device, place)


def give_memory(
    model: nn.Module,
    values: Callable[[str, nn.Parameter], torch.Tensor],
    device: torch.device,
    place: Callable[[nn.Parameter], None] = lambda _: None,
) -> None:
    """Make every parameter of what `values` returns for its name and the empty one, on the device."""
    filled: dict[nn.Parameter, nn.Parameter] = {}  # a tied one is in several modules: the first names it
    for module_name, module in model.named_modules():
        for key, empty in list(module.named_parameters(recurse=False)):
            if empty in filled:
                setattr(module, key, filled[empty])
                continue
            name = f"{module_name}.{key}" if module_name else key
            parameter = nn.Parameter(values(name, empty))
            filled[empty] = parameter
            parameter.__dict__.update(empty.__dict__)  # its slice, and what Megatron noted on it
            setattr(module, key, parameter)
            place(parameter)
        if isinstance(module, PositionTable):
            module.fill(device)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False)

    return run
