"""How a rank's part of a model is called for its result alone: the same in every layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from pgm_scale.models.layers import LayerBuilder
from pgm_scale.parallel.host_device import megatron_device
from pgm_scale.parallel.mesh import Mesh

if TYPE_CHECKING:  # it imports megatron, which few layouts need
    from pgm_scale.parallel.pipeline import PipelineStage


@contextlib.contextmanager
def called_for_inference(
    module: nn.Module, mesh: Mesh, layers: LayerBuilder, stage: PipelineStage | None, doing: str
) -> Iterator[None]:
    """Calls of the module have no gradients, run all stages of a pipeline, and take any number of tokens.

    All ranks of a model copy make them together, and each gets the readout's result.

    Args:
        layers: what made the module's layers.
        stage: the module as a pipeline stage, if it is one.
        doing: what the watchdog hears at each call.
    """
    watched = module.register_forward_pre_hook(lambda *_: mesh.progress(doing))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(megatron_device(needed=mesh.groups is not None))
            if layers.tensor_parallel_size > 1:
                from pgm_scale.parallel.tensor_layers import TensorParallelLayers, whole_sequences

                assert isinstance(layers, TensorParallelLayers)
                stack.enter_context(whole_sequences(module, layers))
            if stage is not None:
                stack.enter_context(stage.called_whole())
            yield
    finally:
        watched.remove()
