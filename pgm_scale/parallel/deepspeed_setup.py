"""How DeepSpeed is set up for a run on a mesh: its settings, and the ranks as it asks for them."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from pgm_scale.config import RunConfig
from pgm_scale.parallel.layout import applied_zero_stage
from pgm_scale.parallel.mesh import Mesh

# Otherwise DeepSpeed compiles a kernel for all-reduce in shared memory at the first start on a CPU (its `zero.Init`
# does so too): it needs a C++ compiler and takes a minute; gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_stage(config: RunConfig, mesh: Mesh) -> int:
    """The stage that DeepSpeed is given."""
    parallel = config.parallel
    needs_partitions = mesh.stages > 1 or parallel.offload_optimizer
    return applied_zero_stage(
        parallel.zero_stage, mesh.data_ranks, config.training.precision, needs_partitions
    )


def weight_dtype(config: RunConfig, mesh: Mesh) -> torch.dtype:
    """Of the weights that the model computes with.

    ZeRO-0 has no partition to hold fp32 master weights: it keeps fp32 weights, which `autocast_forward` casts
    in the matmuls.
    """
    casts = config.training.precision == "bf16" and zero_stage(config, mesh) > 0
    return torch.bfloat16 if casts else torch.float32


def autocast_forward(model: nn.Module, config: RunConfig, mesh: Mesh) -> None:
    """Let a model with fp32 weights compute in bf16, if the run does."""
    if config.training.precision == "bf16" and weight_dtype(config, mesh) == torch.float32:
        # Inside the model, because DeepSpeed switches off an autocast around itself.
        model.forward = torch.autocast(mesh.device.type, dtype=torch.bfloat16)(model.forward)


def deepspeed_config(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's settings for a run on a mesh. It does not clip: `optimizer.clip_in_update` does."""
    training, parallel = config.training, config.parallel
    stage = zero_stage(config, mesh)
    accumulation = training.global_batch_sequences // (training.micro_batch_sequences * mesh.data_ranks)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_sequences,
        # A pipeline hands over the gradients of all micro-batches at once.
        "gradient_accumulation_steps": 1 if mesh.stages > 1 else accumulation,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # left out, it would be 1.0
        "steps_per_print": 1 << 62,
    }
    if parallel.offload_optimizer:
        pinned = mesh.device.type == "cuda"
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        # Torch's fused AdamW does the same and needs no compiler.
        settings["zero_force_ds_cpu_optimizer"] = False
    if training.precision == "bf16" and stage > 0:
        # ZeRO-1 adds each gradient to its fp32 sum in a hook and frees it. A pipeline needs that, as its backward
        # passes are not DeepSpeed's; without one it saves 2 bytes a parameter.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
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
    if mesh.data_ranks == 1 and isinstance(engine.optimizer, torch.optim.Optimizer | BF16_Optimizer):
        # A sum over one rank would copy all gradients into a bucket and back. (The others fill partitions by it.)
        engine.enable_backward_allreduce = False
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
