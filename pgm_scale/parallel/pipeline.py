"""Pipeline parallelism: the stages of a model under Megatron-core's 1F1B schedule.

A stage receives the stream of the one before, runs its span of the model and sends its own stream on; gradients
take the way back. All stages of a model copy have the same micro-batches, so a stage knows the shape of what it
receives, and its positions and segments, from its own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor, nn

from pgm_scale.errors import UserError
from pgm_scale.models.layers import LayerBuilder
from pgm_scale.models.readout import Readout, logits
from pgm_scale.models.stages import unit_kinds
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.micro_step import MicroStep


@dataclass
class _ScheduleConfig(ModelParallelConfig):
    """Megatron's configuration, with the settings of its own models that the schedule reads too."""

    hidden_size: int = 0
    calculate_per_token_loss: bool = True  # the schedule must not divide a loss that is divided already
    fine_grained_activation_offloading: bool = False


class PipelineStage:
    """This rank's span of the model, as the schedule sees it: it sets the input and reads the configuration."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, module: Any, mesh: Mesh, dtype: torch.dtype, layers: LayerBuilder) -> None:
        """`module` has a `span` and `rows_before` (`models.stages`); streams pass between ranks as `dtype`."""
        assert mesh.groups is not None
        self.module, self.mesh, self.dtype = module, mesh, dtype
        self.hidden_size, self._units = module.config.hidden_size, len(unit_kinds(module.config))
        self._layers = layers
        self._group = mesh.groups.pipeline
        self._received: Tensor | None = None
        self.config = _ScheduleConfig(
            hidden_size=self.hidden_size,
            tensor_model_parallel_size=mesh.tensor_ranks,
            pipeline_model_parallel_size=mesh.stages,
            pipeline_dtype=dtype,
            deallocate_pipeline_outputs=True,
        )

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        self._received = received[0]

    def run(self, steps: Sequence[MicroStep], loss_scale: float) -> None:
        """Forward and backward of all micro-batches; the gradients stay in the parameters."""
        first = steps[0].arguments
        received, sent = (
            [self._shape_before(unit, first)] for unit in (self.module.span.first, self.module.span.last)
        )
        forward_backward_pipelining_without_interleaving(
            forward_step_func=partial(self._forward, loss_scale=loss_scale),
            data_iterator=iter(steps),
            model=self,
            num_microbatches=len(steps),
            seq_length=1,  # the true shapes are the adjusted ones
            micro_batch_size=1,
            adjust_tensor_shapes_fn=lambda *_: (received, sent),
        )

    def _forward(self, steps: Iterator[MicroStep], _: Any, loss_scale: float) -> tuple[Tensor, Any]:
        step = next(steps)
        step.begin()
        output = self.module(*step.arguments, readout=step.readout, received=self._received)
        if not self.mesh.is_last_stage and output._base is not None:
            output = output.clone()  # the schedule frees what it has sent, which a view would keep alive

        def loss(result: Any) -> tuple[Tensor, Tensor, dict]:
            return step.loss(result) * loss_scale, torch.tensor(0, dtype=torch.int), {}

        return output, loss

    def _shape_before(self, unit: int, arguments: tuple) -> tuple[int, ...]:
        """Of what passes into `unit`, on each tensor-parallel rank."""
        if not 0 < unit < self._units:
            return ()
        return (self.module.rows_before(unit, *arguments) // self._layers.token_ranks, self.hidden_size)

    @contextmanager
    def called_whole(self) -> Iterator[nn.Module]:
        """For a while, calling the stage's module runs all stages, and each of them gets the readout's result.

        For evaluation, without gradients: the stages wait for each other. Collective over the pipeline.
        """
        module, own_forward = self.module, self.module.forward

        def forward(*arguments: Any, readout: Readout = logits, **options: Any) -> Any:
            received = self._receive(arguments)
            if self.mesh.is_last_stage:
                return self._share(
                    lambda: own_forward(*arguments, readout=readout, received=received, **options)
                )
            stream = own_forward(*arguments, received=received, **options)
            dist.send(stream.contiguous(), group=self._group, group_dst=self.mesh.stage + 1)
            return self._share(None)

        module.forward = forward
        try:
            yield module
        finally:
            del module.forward

    def _receive(self, arguments: tuple) -> Tensor | None:
        if self.mesh.stage == 0:
            return None
        shape = self._shape_before(self.module.span.first, arguments)
        received = torch.empty(shape, dtype=self.dtype, device=self.mesh.device)
        dist.recv(received, group=self._group, group_src=self.mesh.stage - 1)
        return received

    def _share(self, compute: Callable[[], Tensor] | None) -> Tensor:
        """The last stage's result, or its failure, on all stages."""
        outcome: list[Any] = [None]
        result: Tensor | None = None
        if compute is not None:
            try:
                result = compute().contiguous()
                outcome = [(result.shape, result.dtype)]
            except UserError as error:
                outcome = [error]
        source = self.mesh.stages - 1
        dist.broadcast_object_list(outcome, group=self._group, group_src=source, device=torch.device("cpu"))
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        if result is None:
            shape, dtype = outcome[0]
            result = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        dist.broadcast(result, group=self._group, group_src=source)
        return result
