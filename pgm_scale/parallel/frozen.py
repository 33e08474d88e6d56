"""A second copy of the run's model that is only asked, never trained: the teacher of a distillation.

It takes the weights' bytes at the dtype that the engine's model computes with, divided by the data-parallel ranks
under ZeRO-3: no gradients, no fp32 master weights, no optimizer state. It is no part of the engine, and so of no
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pgm_scale.checkpoint.fragments import Kind, TensorKey
from pgm_scale.checkpoint.reader import Wanted
from pgm_scale.config import RunConfig
from pgm_scale.models.initialization import tensor_slice
from pgm_scale.models.layers import LayerBuilder
from pgm_scale.models.vocabulary import OutputLinear
from pgm_scale.parallel.construction import build_own_part, give_memory
from pgm_scale.parallel.deepspeed_setup import autocast_forward, weight_dtype, zero_stage
from pgm_scale.parallel.inference import called_for_inference
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.state import HeldValues, ParameterState, whole_shapes
from pgm_scale.parallel.weight_shards import WeightShards


class FrozenModel:
    """A second copy of the run's model, without gradients, cut over the ranks as the engine's model is.

    With the weights of `take` or `load` it computes the bits that the engine's model would compute with them. All
    weights are 0 before.
    """

    def __init__(
        self, module: nn.Module, shards: WeightShards, config: RunConfig, mesh: Mesh, layers: LayerBuilder
    ) -> None:
        """`module` is on the mesh's device, `shards` has cut its parameters, and `layers` made it."""
        self._module, self._shards, self._mesh, self._layers = module, shards, mesh, layers
        module.requires_grad_(False).eval()
        autocast_forward(module, config, mesh)
        shards.gather_in_calls(module)
        self._whole_shapes = whole_shapes(module, mesh)
        self._stage = None
        if mesh.stages > 1:
            from pgm_scale.parallel.pipeline import PipelineStage

            self._stage = PipelineStage(module, mesh, weight_dtype(config, mesh), layers)

    @classmethod
    def build(
        cls, config: RunConfig, vocab_size: int, length: int, mesh: Mesh, stage_units: Sequence[int] = ()
    ) -> FrozenModel:
        """For the engine that `Engine.build` makes of the same arguments. Collective."""
        module, layers = build_own_part(config, vocab_size, length, mesh, stage_units)
        dtype, shards = weight_dtype(config, mesh), WeightShards(mesh)

        def nothing_yet(_: str, empty: nn.Parameter) -> Tensor:
            return torch.zeros(empty.shape, dtype=dtype, device=mesh.device)

        is_cut = zero_stage(config, mesh) == 3
        give_memory(module, nothing_yet, mesh.device, shards.cut if is_cut else lambda _: None)
        return cls(module, shards, config, mesh, layers)

    def take(self, state: list[ParameterState], values: list[Tensor]) -> None:
        """Copy flat fp32 values into this copy, one tensor beside each entry of the engine's `state`.

        Its weights, or their EMA. They may change afterwards. Collective over the data-parallel ranks; one whole
        parameter in fp32 is held at a time.
        """
        held = HeldValues(state, values, self._mesh)
        for name, parameter in self._module.named_parameters():
            self._mesh.progress("the frozen model takes weights")
            whole = held.whole(name, self._shards.numel(parameter))
            self._fill(parameter, whole[self._shards.start(parameter) :])

    def load(self, read: Callable[[Wanted], dict[TensorKey, list[Tensor]]], kind: Kind = "weight") -> None:
        """Fill this copy from a checkpoint, written in any layout. Collective.

        Args:
            read: `CheckpointStore.read` of a verified step. What this rank needs is on the host at once, in fp32.
            kind: "weight" or "ema".

        Raises:
            UserError: names or shapes of the checkpoint differ from the model's: all are listed.
        """
        own = dict(self._module.named_parameters())
        wanted: Wanted = {
            (kind, name): (shape, [self._range(own[name])] if name in own else [])
            for name, shape in self._whole_shapes.items()
        }
        values = read(wanted)
        for name, parameter in own.items():
            self._fill(parameter, values[kind, name][0])

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """The module, for calls `module(*arguments, readout=readout)` in eval mode, without gradients.

        All ranks of a model copy make them together (under ZeRO-3 all data-parallel ranks too), with whole
        sequences, and each gets the readout's result.
        """
        with called_for_inference(
            self._module, self._mesh, self._layers, self._stage, "asking the frozen model"
        ):
            yield self._module

    @property
    def output_linear(self) -> OutputLinear | None:
        """The last stage's, else None. It may also be called outside `running`, by a readout of another model.

        Under ZeRO-3 its weights are whole while it is called, `output_linear(hidden, compute)`, and `compute` may
        call another model's; all data-parallel ranks make the call.
        """
        if not self._mesh.is_last_stage:
            return None
        layer = getattr(self._module, "output_layer", None)
        return getattr(self._module, "head", None) if layer is None else layer.linear

    def _range(self, parameter: nn.Parameter) -> tuple:
        """What this rank holds of a parameter, without padding: slice, start, length."""
        part = tensor_slice(parameter)
        start = min(self._shards.start(parameter), part.numel)
        return part, start, min(parameter.numel(), part.numel - start)

    @staticmethod
    def _fill(parameter: nn.Parameter, values: Tensor) -> None:
        """Write the first elements that this rank holds, as many as there are values."""
        held = parameter.data.view(-1)
        held[: len(values)] = values[: len(held)]
