"""How DeepSpeed is set up for a run on a mesh: its settings, and the ranks as it asks for them."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from pgm_scale.config import RunConfig
from pgm_scale.parallel.mesh import Mesh

# Otherwise DeepSpeed compiles a kernel for all-reduce in shared memory at the first start on a CPU (its `zero.Init`
# does so too): it needs a C++ compiler and takes a minute; gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's settings for a run on a mesh."""
    training, parallel = config.training, config.parallel
    accumulation = training.global_batch_sequences // (training.micro_batch_sequences * mesh.data_ranks)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_sequences,
        # A pipeline hands over the gradients of all micro-batches at once.
        "gradient_accumulation_steps": 1 if mesh.stages > 1 else accumulation,
        "zero_optimization": {"stage": parallel.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
    }
    if parallel.zero_stage > 0:
        settings["gradient_clipping"] = config.optimizer.gradient_clip_norm
    if parallel.offload_optimizer:
        pinned = mesh.device.type == "cuda"
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        # Torch's fused AdamW does the same and needs no compiler.
        settings["zero_force_ds_cpu_optimizer"] = False
    if training.precision == "bf16" and parallel.zero_stage > 0:
        # A pipeline's backward passes are not DeepSpeed's: ZeRO-1 has to add to its fp32 sums in hooks.
        in_hooks = mesh.stages > 1
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": in_hooks}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"  # twice the bytes; bf16 would round the sums
    return settings


def topology(mesh: Mesh) -> Topology | None:
    """What DeepSpeed has to know of tensor and pipeline parallelism; None where there is none."""
    return Topology(mesh) if mesh.groups is not None else None


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], mesh: Mesh
) -> Any:
    """DeepSpeed's engine over a model that is on its device."""
    deepspeed.utils.groups.mpu = None  # an engine of another layout may have left its own here
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints memory tables
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=topology(mesh)
        )
    return engine


def parameter_partition(config: RunConfig, mesh: Mesh, dtype: torch.dtype) -> Any:
    """What takes parameters apart for ZeRO-3, one by one, before there is an engine."""
    return deepspeed.zero.Init(
        data_parallel_group=mesh.data_group,
        config_dict_or_path=deepspeed_config(config, mesh),
        dtype=dtype,
        mpu=topology(mesh),
    )


class Topology:
    """The mesh by the interface that DeepSpeed calls `mpu`.

    Its model-parallel group is tensor x pipeline, as gradient norms and overflows span a whole model copy.
    """

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.groups is not None
        self._groups = mesh.groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.model

    def get_model_parallel_rank(self) -> int:
        return self._groups.model.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._groups.model.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.data)

    def get_data_parallel_rank(self) -> int:
        return self._groups.data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.tensor.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.tensor.size()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._groups.pipeline.rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.pipeline.size()
