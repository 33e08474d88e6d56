"""The DeepSpeed engine: forward, backward and update of a plain model over data-parallel ranks, ZeRO 0 to 3.

What the rest of the package needs of it is small: call it like the model, `backward`, `step`, and the fp32
training state of this rank as flat views (`parallel.state`), which is all that checkpoints and the EMA use.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import nn

from pgm_scale.config import RunConfig
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.optimizer import build_adamw
from pgm_scale.parallel.state import ParameterState, find_state, refresh_weights


class Engine:
    """A model under DeepSpeed.

    Gradients are summed over micro-batches and ranks, never averaged: the caller divides the loss by the
    number of tokens in the global batch, so that every layout computes the same update.
    """

    def __init__(self, model: nn.Module, config: RunConfig, mesh: Mesh) -> None:
        self.mesh = mesh
        self.zero_stage = config.parallel.zero_stage
        self.micro_steps = config.training.global_batch_sequences // (
            config.training.micro_batch_sequences * mesh.data_ranks
        )
        self._clip_norm = config.optimizer.gradient_clip_norm
        # ZeRO-0 has no partition to hold fp32 master weights: keep fp32 weights and cast in the matmuls.
        self._autocast = config.training.precision == "bf16" and self.zero_stage == 0
        if self._autocast:
            # Inside the model, because DeepSpeed switches off an autocast around itself.
            model.forward = torch.autocast(mesh.device.type, dtype=torch.bfloat16)(model.forward)
        # Otherwise DeepSpeed compiles a kernel for all-reduce in shared memory at the first start on a CPU:
        # it needs a C++ compiler and takes a minute; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Before ZeRO-3 takes the parameters apart.
        self.parameter_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        model = model.to(mesh.device)
        optimizer = build_adamw(model.parameters(), config.optimizer, mesh.device)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory tables
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self._deepspeed_config(config)
            )
        self._optimizer = optimizer
        self.state: list[ParameterState] = find_state(self._engine, optimizer, self.zero_stage)
        self.gradient_norm = math.nan

    def _deepspeed_config(self, config: RunConfig) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": config.training.micro_batch_sequences,
            "gradient_accumulation_steps": self.micro_steps,
            "zero_optimization": {"stage": self.zero_stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 62,
        }
        if self.zero_stage > 0:
            settings["gradient_clipping"] = self._clip_norm
        if config.training.precision == "bf16" and not self._autocast:
            settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            settings["communication_data_type"] = "fp32"  # twice the bytes; bf16 would round the sums
        return settings

    @property
    def module(self) -> nn.Module:
        """The model itself; in ZeRO-3 every rank must join each of its forward passes."""
        return self._engine.module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._engine(*arguments, **options)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's share of the global mean loss."""
        # DeepSpeed averages over ranks; the loss is already divided by the global token count.
        self._engine.backward(loss * self.mesh.data_ranks, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # not an update: it only counts the micro-batch

    def step(self, learning_rate: float) -> bool:
        """Clip and update, after the last micro-batch's `backward`. False: the gradient was not finite.

        No rank applies an update with a non-finite gradient; `gradient_norm` is then not finite.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self.zero_stage == 0:
            # The same gradients are on all ranks by now; DeepSpeed would not tell their norm.
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_norm)
            self.gradient_norm = float(norm)
            if not math.isfinite(self.gradient_norm):
                return False
        self._engine.step()
        if self.zero_stage > 0:
            self.gradient_norm = float(self._engine.get_global_grad_norm())
        return math.isfinite(self.gradient_norm) and self.gradient_norm >= 0

    def train(self) -> None:
        self._engine.train()

    @contextlib.contextmanager
    def evaluation(self, weights: list[torch.Tensor] | None) -> Iterator[nn.Module]:
        """The module in eval mode, with `weights` (one flat fp32 tensor beside each of `state`) if given.

        The training weights are back afterwards, bit for bit.
        """
        kept = None
        if weights is not None:
            kept = [entry.weight.clone() for entry in self.state]
            self.load_weights(weights)
        self._engine.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self._engine.train()
            if kept is not None:
                self.load_weights(kept)

    def load_weights(self, weights: list[torch.Tensor]) -> None:
        """Copy flat values into this rank's fp32 weights and make the model compute with them."""
        for entry, values in zip(self.state, weights, strict=True):
            entry.weight.copy_(values)
        self.refresh_weights()

    def restore_updates(self, updates: int) -> None:
        """Set Adam's count of updates, after `state` was written to from a checkpoint."""
        for entry in self.state:
            entry.step.fill_(updates)
        for group in self._optimizer.param_groups:
            if "step" in group:  # Apex counts there
                group["step"] = updates

    def refresh_weights(self) -> None:
        """After `state` was written to: bring the weights that the model computes with up to date."""
        refresh_weights(self._engine, self.state, self.zero_stage)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module."""
        self._engine.destroy()
