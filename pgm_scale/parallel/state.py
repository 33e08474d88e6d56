"""Where DeepSpeed keeps a rank's fp32 weights and Adam moments, as flat views into them.

This is the one file that knows DeepSpeed's memory layout (deepspeed 0.19):
ZeRO-0 has whole parameters in a plain optimizer; ZeRO-1, ZeRO-2 and its bf16 optimizer have one flat
partition a parameter group and map a parameter to a range of it in `_hp_mapping`; ZeRO-3 has flat
sub-groups and gives each parameter an equal, padded share a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """The range [start, start + len) of one parameter, flattened row-major, that this rank holds in fp32.

    `weight`, `exp_avg` and `exp_avg_sq` are 1-D views of the live state: writing to them changes it.
    `replicated` ranges are held by every rank, others by one rank alone.
    """

    name: str
    global_shape: tuple[int, ...]
    start: int
    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor  # Adam's update counter, shared by the parameters of one flat partition
    replicated: bool
    parameter: torch.nn.Parameter


def _moments(optimizer: torch.optim.Optimizer, key: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adam's state of one tensor, made now if the optimizer has not stepped: a resume needs it before."""
    state = optimizer.state[key]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=key.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(key)
    return state


def find_state(engine: Any, optimizer: torch.optim.Optimizer, zero_stage: int) -> list[ParameterState]:
    """The fp32 state of this rank, in parameter order; parameters of which it holds nothing are left out."""
    finder = {0: _replicated_state, 1: _partitioned_state, 2: _partitioned_state, 3: _sharded_state}
    found = (
        finder[zero_stage](name, parameter, engine.optimizer, optimizer)
        for name, parameter in engine.module.named_parameters()
    )
    return [entry for entry in found if entry is not None]


def _replicated_state(
    name: str, parameter: torch.nn.Parameter, _: Any, optimizer: torch.optim.Optimizer
) -> ParameterState:
    state = _moments(optimizer, parameter)
    return ParameterState(
        name,
        tuple(parameter.shape),
        0,
        parameter.data.view(-1),
        state["exp_avg"].view(-1),
        state["exp_avg_sq"].view(-1),
        state["step"],
        True,
        parameter,
    )


def _partitioned_state(
    name: str, parameter: torch.nn.Parameter, _: Any, optimizer: torch.optim.Optimizer
) -> ParameterState | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    partition = optimizer.param_groups[mapping.param_group_index]["params"][0]
    state = _moments(optimizer, partition)
    address = mapping.hp_fragment_address
    return ParameterState(
        name,
        tuple(parameter.shape),
        mapping.lp_fragment_address.start,
        partition.data.narrow(0, address.start, address.numel),
        state["exp_avg"].narrow(0, address.start, address.numel),
        state["exp_avg_sq"].narrow(0, address.start, address.numel),
        state["step"],
        False,
        parameter,
    )


def _sharded_state(
    name: str, parameter: Any, zero_optimizer: Any, optimizer: torch.optim.Optimizer
) -> ParameterState | None:
    group, offset, share = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
    start = share * dist.get_rank()
    count = min(share, parameter.ds_numel - start)  # the last shares are padded
    if count <= 0:
        return None
    partition = zero_optimizer.fp32_partitioned_groups_flat[group]
    state = _moments(optimizer, partition)
    return ParameterState(
        name,
        tuple(parameter.ds_shape),
        start,
        partition.data.narrow(0, offset, count),
        state["exp_avg"].narrow(0, offset, count),
        state["exp_avg_sq"].narrow(0, offset, count),
        state["step"],
        False,
        parameter,
    )


def refresh_weights(engine: Any, state: list[ParameterState], zero_stage: int) -> None:
    """Bring the weights that the model computes with up to date with the fp32 state.

    ZeRO-1 and 2 sum one parameter at a time over the ranks, zeros where a rank holds nothing: twice the
    bytes of an all-gather, but no assumption on the order of partitions; it runs once a resume or validation.
    """
    if zero_stage == 3:
        _refresh_sharded(engine.optimizer)
    elif zero_stage > 0:
        held = {entry.name: entry for entry in state}
        for name, parameter in engine.module.named_parameters():
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if name in held:
                entry = held[name]
                whole[entry.start : entry.start + entry.weight.numel()] = entry.weight
            if dist.get_world_size() > 1:
                dist.all_reduce(whole)
            parameter.data.copy_(whole.view(parameter.shape))


def _refresh_sharded(zero_optimizer: Any) -> None:
    for group in range(len(zero_optimizer.fp32_partitioned_groups_flat)):
        zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
    persistent = zero_optimizer.persistent_parameters  # small ones, kept whole on every rank
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
