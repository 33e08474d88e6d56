"""The DeepSpeed engine: forward, backward and update of a model over all ranks of a mesh.

ZeRO 0 to 3 over the data-parallel ranks, each with its part of the model: all of it, the slices of a
tensor-parallel rank, or the span of a pipeline stage. What the rest of the package needs of it is small:
`forward_backward`, `step`, and the fp32 training state of this rank as flat views (`parallel.state`), which is
all that checkpoints and the EMA use.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pgm_scale.config import RunConfig
from pgm_scale.errors import UserError
from pgm_scale.models.initialization import is_split, note_slices
from pgm_scale.models.layers import LOCAL_LAYERS, LayerBuilder
from pgm_scale.models.stages import is_shared
from pgm_scale.parallel.construction import build_own_part, materialize
from pgm_scale.parallel.deepspeed_setup import (
    autocast_forward,
    deepspeed_config,
    initialize,
    parameter_partition,
    weight_dtype,
    zero_stage,
)
from pgm_scale.parallel.gradient_norm import total_norm
from pgm_scale.parallel.host_device import megatron_device
from pgm_scale.parallel.inference import called_for_inference
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.micro_step import MicroStep
from pgm_scale.parallel.optimizer import build_adamw, guard_update
from pgm_scale.parallel.state import (
    ParameterState,
    find_state,
    is_first_copy,
    refresh_weights,
    summed_gradient,
    whole_shapes,
)


class Engine:
    """A model, or this rank's part of it, under DeepSpeed.

    Gradients are summed over micro-batches and ranks, never averaged: the caller divides the loss by the
    number of tokens in the global batch, so that every layout computes the same update.
    """

    def __init__(
        self, model: nn.Module, config: RunConfig, mesh: Mesh, layers: LayerBuilder = LOCAL_LAYERS
    ) -> None:
        """`model` is on the mesh's device, with equal weights on all data-parallel ranks; `layers` made it."""
        self.mesh, self.layers = mesh, layers
        self.zero_stage = zero_stage(config, mesh)
        self.micro_steps = config.training.global_batch_sequences // (
            config.training.micro_batch_sequences * mesh.data_ranks
        )
        note_slices(model)
        self._mark_copies(model)
        autocast_forward(model, config, mesh)
        self.parameter_shapes = whole_shapes(model, mesh)
        if layers.token_ranks > 1:
            from pgm_scale.parallel.tensor_layers import sum_partial_gradients

            sum_partial_gradients(model, self._groups.tensor)
        settings = deepspeed_config(config, mesh)
        updates_on = torch.device("cpu") if config.parallel.offload_optimizer else mesh.device
        optimizer = build_adamw(model.parameters(), config.optimizer, updates_on)
        clip_norm = config.optimizer.gradient_clip_norm
        guard_update(optimizer, clip_norm, self._norm_of_update, self._may_update)
        self._engine = initialize(model, optimizer, settings, mesh)
        self._optimizer = optimizer
        self._stage = None
        if mesh.stages > 1:
            from pgm_scale.parallel.pipeline import PipelineStage

            self._stage = PipelineStage(self.module, mesh, weight_dtype(config, mesh), layers)
        self.state: list[ParameterState] = find_state(self._engine, optimizer, self.zero_stage, mesh)
        self.gradient_norm = math.nan
        self.updates = 0  # Adam's count
        self._accepts: Callable[[float], bool] = math.isfinite
        self._accepted: bool | None = None  # whether the update under way is; None: not known yet

    @classmethod
    def build(
        cls, config: RunConfig, vocab_size: int, length: int, mesh: Mesh, stage_units: Sequence[int] = ()
    ) -> Engine:
        """The engine of a run's model with its initial weights; `stage_units` are those of each stage."""
        model, layers = build_own_part(config, vocab_size, length, mesh, stage_units)
        dtype = weight_dtype(config, mesh)
        partition = parameter_partition(config, mesh, dtype) if zero_stage(config, mesh) == 3 else None

        def place(parameter: nn.Parameter) -> None:
            mesh.progress("drawing the initial weights")
            if partition is not None:
                partition._convert_to_zero_parameters([parameter])

        materialize(model, config.training.seed, mesh.device, dtype, place)
        return cls(model, config, mesh, layers)

    @property
    def _groups(self) -> Any:
        assert self.mesh.groups is not None
        return self.mesh.groups

    @property
    def module(self) -> nn.Module:
        """The model itself; in ZeRO-3 every rank must join each of its forward passes."""
        return self._engine.module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._engine(*arguments, **options)

    def forward_backward(self, steps: Iterable[MicroStep]) -> None:
        """Forward and backward of all micro-batches of a step; afterwards every gradient is whole.

        Each micro-batch is taken when its turn comes; a pipeline takes all of them first.
        """
        with megatron_device(needed=self.mesh.groups is not None):
            if self._stage is not None:
                self._run_pipeline(list(steps))
                return
            for step in steps:
                step.begin()
                self.backward(step.loss(self(*step.arguments, readout=step.readout)))

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's share of the global mean loss."""
        # DeepSpeed averages over ranks; the loss is already divided by the global token count.
        self._engine.backward(loss * self.mesh.data_ranks, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # not an update: it only counts the micro-batch

    def _run_pipeline(self, steps: Sequence[MicroStep]) -> None:
        """Megatron's schedule calls the module itself; DeepSpeed sees the gradients once they are complete."""
        assert self._stage is not None
        zero = self._engine.optimizer
        zero.clear_backward_seen_flag()  # drops the fp32 sums of the step before, as its own forward would
        self._engine.set_gradient_accumulation_boundary(False)
        self._stage.run(steps, loss_scale=self.mesh.data_ranks)  # DeepSpeed averages over ranks
        self._sum_shared_gradients(zero)
        self._engine.set_gradient_accumulation_boundary(True)
        if self._engine.enable_backward_allreduce:
            self._engine.allreduce_gradients()

    def _sum_shared_gradients(self, zero: Any) -> None:
        """The parameters that every stage has get the sum of what the stages have computed for them."""
        for name, parameter in self.module.named_parameters():
            if is_shared(name):
                dist.all_reduce(summed_gradient(zero, parameter), group=self._groups.pipeline)

    def step(self, learning_rate: float, accepts: Callable[[float], bool] = math.isfinite) -> bool:
        """Clip and update, after `forward_backward`; the gradients are gone afterwards.

        Args:
            accepts: says, of the finite norm of the whole gradient, whether to update with it; equal on all ranks.

        Returns:
            False if it did not, or the gradient was not finite (as `gradient_norm` then is): no rank has changed
            anything.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._accepts, self._accepted = accepts, None
        if self.zero_stage == 0:
            self.gradient_norm = self._norm_of_replicated()
        self._engine.step()
        if self.zero_stage > 0:
            norm = self._norm_of_update()
            self.gradient_norm = norm if norm >= 0 else math.nan  # DeepSpeed's -1 is "not finite"
        updated = bool(self._accepted)  # never asked where DeepSpeed itself has refused
        self.updates += updated
        return updated

    def _may_update(self) -> bool:
        """Asked by every part of an update (ZeRO-3 has several), answered once."""
        if self._accepted is None:
            norm = self._norm_of_update()
            self._accepted = math.isfinite(norm) and norm >= 0 and self._accepts(norm)
        return self._accepted

    def _norm_of_update(self) -> float:
        """Of the gradients that DeepSpeed updates with; not finite, or negative, if it refuses them."""
        return float(self.gradient_norm if self.zero_stage == 0 else self._engine.optimizer._global_grad_norm)

    def _norm_of_replicated(self) -> float:
        """ZeRO-0: every data-parallel rank has the same gradients, of which DeepSpeed would not tell the norm."""
        gradients = []
        for name, parameter in self.module.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # it decays all the same, as in a partition
            if is_first_copy(name, parameter, self.mesh):
                gradients.append(parameter.grad)
        norm = total_norm(gradients)
        if self.mesh.groups is None:
            return float(norm)
        squared = norm.to(self.mesh.device, torch.float64) ** 2
        dist.all_reduce(squared, group=self._groups.model)
        return math.sqrt(squared)

    def train(self) -> None:
        self._engine.train()

    @contextlib.contextmanager
    def evaluation(self, weights: list[torch.Tensor] | None) -> Iterator[nn.Module]:
        """The module in eval mode, with `weights` (one flat fp32 tensor beside each of `state`) if given.

        All ranks of a model copy call it together, and each gets the result. The training weights are back
        afterwards, bit for bit, unless it ends in an error that other ranks may not have: bringing them back
        takes all ranks.
        """
        kept = None
        if weights is not None:
            kept = [entry.weight.clone() for entry in self.state]
            self.load_weights(weights)

        def restore() -> None:
            self._engine.train()
            if kept is not None:
                self.load_weights(kept)

        self._engine.eval()
        try:
            with called_for_inference(self.module, self.mesh, self.layers, self._stage, "evaluation"):
                yield self.module
        except UserError:  # raised on all ranks or on none
            restore()
            raise
        else:
            restore()

    def load_weights(self, weights: list[torch.Tensor]) -> None:
        """Copy flat values into this rank's fp32 weights and make the model compute with them."""
        for entry, values in zip(self.state, weights, strict=True):
            entry.weight.copy_(values)
        self.refresh_weights()

    def restore_updates(self, updates: int) -> None:
        """Set Adam's count of updates, after `state` was written to from a checkpoint."""
        self.updates = updates
        for entry in self.state:
            entry.step.fill_(updates)
        for group in self._optimizer.param_groups:
            if "step" in group:  # Apex counts there
                group["step"] = updates

    def refresh_weights(self) -> None:
        """After `state` was written to: bring the weights that the model computes with up to date."""
        refresh_weights(self._engine, self.state, self.zero_stage, self.mesh)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module."""
        self._engine.destroy()

    def _mark_copies(self, model: nn.Module) -> None:
        """Tell DeepSpeed which parameters count once in the gradient norm though several ranks hold them."""
        for name, parameter in model.named_parameters():
            parameter.tensor_model_parallel = is_split(parameter)  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = self.mesh.stage > 0 and is_shared(name)  # type: ignore[attr-defined]
