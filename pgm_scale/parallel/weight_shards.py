"""The weights of a module without gradients, cut evenly over the data-parallel ranks, as ZeRO-3 cuts a model's.

DeepSpeed's own hooks follow one model in the order of its first pass; these gather a module's weights whenever it
is called, alone or inside another model's forward pass. The price is that nothing is fetched ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pgm_scale.parallel.mesh import Mesh

# Smaller ones (norms, biases) are whole on every rank, as DeepSpeed's are: each gather takes time of its own.
WHOLE_BELOW_ELEMENTS = 100_000


class WeightShards:
    """Which range of each flattened parameter this rank holds: all of it, or, after `cut`, a share."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._shapes: dict[nn.Parameter, torch.Size] = {}  # whole shapes of those that are cut

    def cut(self, parameter: nn.Parameter) -> None:
        """Keep this rank's share alone, the last ones padded. Every rank has the same values."""
        if parameter.numel() <= WHOLE_BELOW_ELEMENTS or self._mesh.data_ranks == 1:
            return
        self._shapes[parameter] = parameter.shape
        share = -(-parameter.numel() // self._mesh.data_ranks)
        values = parameter.data.flatten()[self._mesh.data_rank * share :][:share]
        parameter.data = torch.zeros(share, dtype=values.dtype, device=values.device)
        parameter.data[: len(values)] = values

    def numel(self, parameter: nn.Parameter) -> int:
        """Elements of the whole parameter."""
        return self._shapes.get(parameter, parameter.shape).numel()

    def start(self, parameter: nn.Parameter) -> int:
        """Where in the whole parameter, flattened, this rank's elements start."""
        return self._mesh.data_rank * parameter.numel() if parameter in self._shapes else 0

    def gather_in_calls(self, module: nn.Module) -> None:
        """While a module inside `module` is called, its own cut parameters are whole. Collective, each call.

        A whole one takes the place of the cut one, so what autograd saves of it stays valid after the call.
        """
        for part in module.modules():
            keys = [key for key, parameter in part._parameters.items() if parameter in self._shapes]
            if keys:
                before, after = self._hooks(keys)
                part.register_forward_pre_hook(before)
                part.register_forward_hook(after, always_call=True)

    def _hooks(self, keys: list[str]) -> tuple[Callable[..., None], Callable[..., None]]:
        """Of a module whose parameters at `keys` are cut."""
        held: list[
            dict[str, nn.Parameter]
        ] = []  # of calls under way: a module may be called inside its own call

        def before(part: nn.Module, _: Any) -> None:
            held.append({key: part.get_parameter(key) for key in keys})
            for key, parameter in held[-1].items():
                if parameter in self._shapes:
                    part._parameters[key] = nn.Parameter(self._whole(parameter), requires_grad=False)

        def after(part: nn.Module, *_: Any) -> None:
            part._parameters.update(held.pop())

        return before, after

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        flat = parameter.new_empty(parameter.numel() * self._mesh.data_ranks)
        dist.all_gather_into_tensor(flat, parameter.data, group=self._mesh.data_group)
        shape = self._shapes[parameter]
        return flat[: shape.numel()].view(shape)
