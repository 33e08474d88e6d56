"""Where DeepSpeed keeps a rank's fp32 weights and Adam moments, as flat views into them, and gradients.

"Flat" is the rank's own tensor, flattened: under tensor parallelism a slice of the whole one (`tensor_slices`).

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

from pgm_scale.models.initialization import is_split, tensor_slice
from pgm_scale.models.stages import is_shared
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.tensor_slices import TensorSlice

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """The range [start, start + len) of one flattened parameter that this rank holds in fp32.

    `weight`, `exp_avg` and `exp_avg_sq` are 1-D views of the live state: writing to them changes it. Rows that
    pad a vocabulary are not in them.

    Attributes:
        part: which elements of the whole tensor the flattened parameter has.
        replicated: every data-parallel rank holds the same range; else this one alone.
        is_first_copy: no tensor-parallel rank or pipeline stage before this one holds the same parameter.
    """

    name: str
    part: TensorSlice
    start: int
    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor  # Adam's update counter, shared by the parameters of one flat partition
    replicated: bool
    is_first_copy: bool


@dataclass(frozen=True)
class _Place:
    """Flat tensors of fp32 values and moments, and where in them, from `offset`, a parameter's range lies."""

    start: int
    count: int
    offset: int
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]


def _moments(optimizer: torch.optim.Optimizer, key: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adam's state of one tensor, made now if the optimizer has not stepped: a resume needs it before."""
    state = optimizer.state[key]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=key.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(key)
    return state


def find_state(
    engine: Any, optimizer: torch.optim.Optimizer, zero_stage: int, mesh: Mesh
) -> list[ParameterState]:
    """The fp32 state of this rank, in parameter order; parameters of which it holds nothing are left out."""
    find_place = {0: _replicated, 1: _partitioned, 2: _partitioned, 3: _sharded}[zero_stage]
    entries = []
    for name, parameter in engine.module.named_parameters():
        place = find_place(parameter, engine.optimizer, optimizer, mesh)
        part = tensor_slice(parameter)
        count = min(place.count, part.numel - place.start) if place else 0
        if place is None or count <= 0:
            continue
        entries.append(
            ParameterState(
                name=name,
                part=part,
                start=place.start,
                weight=place.weight.narrow(0, place.offset, count),
                exp_avg=place.moments["exp_avg"].narrow(0, place.offset, count),
                exp_avg_sq=place.moments["exp_avg_sq"].narrow(0, place.offset, count),
                step=place.moments["step"],
                replicated=zero_stage == 0,
                is_first_copy=is_first_copy(name, parameter, mesh),
            )
        )
    return entries


def is_first_copy(name: str, parameter: torch.nn.Parameter, mesh: Mesh) -> bool:
    """Whether no tensor-parallel rank and no pipeline stage before this one holds the same parameter."""
    return (is_split(parameter) or mesh.tensor_rank == 0) and (mesh.stage == 0 or not is_shared(name))


def _replicated(parameter: torch.nn.Parameter, _: Any, optimizer: torch.optim.Optimizer, __: Mesh) -> _Place:
    moments = {key: value.view(-1) for key, value in _moments(optimizer, parameter).items() if key != "step"}
    moments["step"] = optimizer.state[parameter]["step"]
    return _Place(0, parameter.numel(), 0, parameter.data.view(-1), moments)


def _partitioned(
    parameter: torch.nn.Parameter, _: Any, optimizer: torch.optim.Optimizer, __: Mesh
) -> _Place | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    partition = optimizer.param_groups[mapping.param_group_index]["params"][0]
    address = mapping.hp_fragment_address
    return _Place(
        mapping.lp_fragment_address.start,
        address.numel,
        address.start,
        partition.data,
        _moments(optimizer, partition),
    )


def _sharded(
    parameter: Any, zero_optimizer: Any, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> _Place | None:
    group, offset, share = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
    start = share * mesh.data_rank
    count = min(share, parameter.ds_numel - start)  # the last shares are padded
    partition = zero_optimizer.fp32_partitioned_groups_flat[group]
    return _Place(start, count, offset, partition.data, _moments(optimizer, partition))


def summed_gradient(zero_optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """ZeRO-1: the sum of a parameter's gradients over the micro-batches, before it is reduced over the ranks.

    A parameter that had none counts from now on with zeros.
    """
    if hasattr(zero_optimizer, "fp32_groups_has_gradients"):  # the bf16 optimizer, with one buffer for all
        [index] = [i for i, other in enumerate(zero_optimizer.bf16_groups[0]) if other is parameter]
        zero_optimizer.fp32_groups_has_gradients[0][index] = True
        return zero_optimizer.fp32_groups_gradients[0][index]
    gradient = zero_optimizer.get_gradient_for_reduction(parameter)
    if gradient is None:
        parameter.grad = torch.zeros_like(parameter)
        if zero_optimizer.use_grad_accum_attribute:
            zero_optimizer._fill_param_grad_accum_attribute(parameter)
        gradient = zero_optimizer.get_gradient_for_reduction(parameter)
    return gradient


def whole_shapes(module: torch.nn.Module, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of the parameters of all stages; their slices are noted. Collective."""
    own = {name: tensor_slice(parameter).global_shape for name, parameter in module.named_parameters()}
    if mesh.stages == 1:
        return own
    return {name: shape for part in mesh.gather(own) for name, shape in part.items()}


def refresh_weights(engine: Any, state: list[ParameterState], zero_stage: int, mesh: Mesh) -> None:
    """Bring the weights that the model computes with up to date with the fp32 state."""
    if zero_stage == 3:
        _refresh_sharded(engine.optimizer)
    elif zero_stage > 0:
        held = HeldValues(state, [entry.weight for entry in state], mesh)
        for name, parameter in engine.module.named_parameters():
            parameter.data.copy_(held.whole(name, parameter.numel()).view(parameter.shape))


class HeldValues:
    """Flat fp32 `values`, one tensor beside each entry of a `state`, of which whole parameters can be made."""

    def __init__(self, state: list[ParameterState], values: list[torch.Tensor], mesh: Mesh) -> None:
        pairs = zip(state, values, strict=True)
        self._held = {entry.name: (entry, own_values) for entry, own_values in pairs}
        self._mesh = mesh

    def whole(self, name: str, count: int) -> torch.Tensor:
        """All `count` values of a flattened parameter, on the mesh's device; 0 in rows that pad a vocabulary.

        Collective: ranges that the data-parallel ranks have parts of are summed over them, zeros where a rank
        holds nothing. That is twice the bytes of an all-gather, but assumes nothing of the order of partitions; it
        runs once a resume or validation.
        """
        whole = torch.zeros(count, dtype=torch.float32, device=self._mesh.device)
        is_whole_here = False
        if name in self._held:
            entry, values = self._held[name]
            whole[entry.start : entry.start + values.numel()] = values
            is_whole_here = entry.replicated
        if self._mesh.data_ranks > 1 and not is_whole_here:
            dist.all_reduce(whole, group=self._mesh.data_group)
        return whole


def _refresh_sharded(zero_optimizer: Any) -> None:
    # A forward pass that left out a module, as a readout may the output linear, leaves it whole, fetched ahead.
    zero_optimizer._partition_all_parameters()
    for group in range(len(zero_optimizer.fp32_partitioned_groups_flat)):
        zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
    persistent = zero_optimizer.persistent_parameters  # small ones, kept whole on every rank
    if persistent:
        persistent[0].all_gather(persistent)
