"""Weights that are cut over the ranks, and whole in the calls of their modules."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgm_scale.parallel import weight_shards
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.weight_shards import WeightShards
from tests.distributed import run_ranks

ROWS, WIDTH = 5, 2  # 10 weights and 5 biases: 3 ranks hold 4, 4, 2 and 2, 2, 1, the last ones padded with 0
SHARES = {"weight": 4, "bias": 2}


class Linear(nn.Linear):
    """Calls `compute` while its weights are whole."""

    def forward(self, x: Tensor, compute: Any = None) -> Tensor:
        return super().forward(x) if compute is None else compute(x)


def _linear() -> Linear:
    linear = Linear(WIDTH, ROWS)
    for parameter in linear.parameters():
        parameter.data = torch.arange(1.0, parameter.numel() + 1).view(parameter.shape)
    return linear.requires_grad_(False)


def _cut(mesh: Mesh, module: nn.Module) -> WeightShards:
    shards = WeightShards(mesh)
    for parameter in module.parameters():
        shards.cut(parameter)
    shards.gather_in_calls(module)
    return shards


def _holds_its_share(mesh: Mesh, linear: Linear, shards: WeightShards) -> None:
    for name, whole in _linear().named_parameters():
        parameter, share = linear.get_parameter(name), SHARES[name]
        assert shards.numel(parameter) == whole.numel()
        assert shards.start(parameter) == mesh.data_rank * share
        values = whole.flatten()[mesh.data_rank * share :][:share].tolist()
        assert parameter.tolist() == values + [0.0] * (share - len(values))


def _everything(mesh: Mesh) -> None:
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
    kept = _linear()
    _holds_all(mesh, kept, _cut(mesh, kept))
    weight_shards.WHOLE_BELOW_ELEMENTS = 0
    expected, linear = _linear()(x), _linear()
    shards = _cut(mesh, linear)
    _holds_its_share(mesh, linear, shards)

    result = linear(x)
    assert torch.equal(result, expected)
    _holds_its_share(mesh, linear, shards)
    (gradient,) = torch.autograd.grad(result.square().sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(expected.square().sum(), x)[0])

    twice = linear(x, lambda given: linear(given) + linear.weight.sum() + linear(given))
    assert torch.equal(twice, 2 * expected + 55)
    _holds_its_share(mesh, linear, shards)

    with pytest.raises(ZeroDivisionError):
        linear(x, lambda _: 1 / 0)
    _holds_its_share(mesh, linear, shards)
    _tied(mesh, x)


def _holds_all(mesh: Mesh, kept: Linear, shards: WeightShards) -> None:
    """Small parameters are not cut."""
    for name, parameter in kept.named_parameters():
        assert torch.equal(parameter, _linear().get_parameter(name))
        assert (shards.start(parameter), shards.numel(parameter)) == (0, parameter.numel())


def _tied(mesh: Mesh, x: Tensor) -> None:
    """One parameter of two modules is cut once, and whole in the calls of both."""
    tied: Any = nn.ModuleList([_linear(), _linear()])
    tied[1].weight = tied[0].weight
    _cut(mesh, tied)
    assert tied[1].weight is tied[0].weight
    assert tied[0].weight.shape == (SHARES["weight"],)

    nested = tied[0](x, lambda given: tied[1](given) + tied[0].weight.sum())
    assert torch.equal(nested, _linear()(x) + 55)
    assert tied[1].weight is tied[0].weight


def test_weights_are_whole_in_calls_alone() -> None:
    run_ranks(3, _everything)
