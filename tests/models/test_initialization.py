"""Initial values: the published distributions, a stream a name, and the same bits under every parallel layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pgm_scale.config import ModelConfig, ParallelConfig
from pgm_scale.models.initialization import tensor_slice
from pgm_scale.models.layers import LOCAL_LAYERS
from pgm_scale.models.readout import TokenNLL
from pgm_scale.models.stages import whole_span
from pgm_scale.parallel.construction import build_part, layer_builder, materialize, stage_span
from pgm_scale.parallel.mesh import Mesh
from tests.models.builders import (
    HIDDEN,
    LENGTH,
    VOCAB,
    autoregressive_config,
    diffusion_config,
    image_config,
    pack_groups,
    partition_config,
)

CPU = torch.device("cpu")
MODELS: dict[str, Any] = {
    name: replace(config, num_heads=4)
    for name, config in {
        "pgm": partition_config(),
        "image pgm": image_config(registers=4),
        "pgm mlp4": partition_config("learn+freqs+mean", "mlp4"),
        "mdlm": diffusion_config(),
        "ar": autoregressive_config(),
    }.items()
}


def initialised(config: ModelConfig, seed: int = 1, vocab_size: int = VOCAB) -> nn.Module:
    model = build_part(config, vocab_size, LENGTH, LOCAL_LAYERS, whole_span(config), recomputes=False)
    assert all(p.is_meta for p in model.parameters())
    materialize(model, seed, CPU, torch.float32)
    return model


def _fan_in(model: nn.Module, name: str) -> int:
    """Inputs of the linear that a weight or bias belongs to."""
    return int(model.get_parameter(name.rpartition(".")[0] + ".weight").shape[1])


@pytest.mark.parametrize("name", MODELS)
def test_values_have_the_published_distributions(name: str) -> None:
    model = initialised(MODELS[name])
    for key, parameter in model.named_parameters():
        values = parameter.detach()
        if "adaLN" in key or key.startswith("output_layer.linear"):
            assert not values.any(), key
        elif "norm" in key:
            assert (values == (0 if key.endswith("bias") else 1)).all(), key
        elif key.endswith(("base_embedding", "cls_embed.embedding_table.weight", "reg_tokens.weight")):
            scaled = values / (0.02 if key.startswith("reg_tokens") else 1.0)
            error = 5 / math.sqrt(values.numel())
            assert abs(float(scaled.mean())) < error, key
            assert abs(float(scaled.std()) - 1) < error, key
        else:
            bound = (HIDDEN if key == "vocab_embed.embedding" else _fan_in(model, key)) ** -0.5
            scaled = values / bound
            error = 6 / math.sqrt(values.numel())  # of a mean of that many, generously
            assert 1 - 4 * error < float(scaled.abs().max()) <= 1, key
            assert abs(float(scaled.mean())) < error, key
            assert abs(float(scaled.abs().mean()) - 0.5) < error, key


def test_an_initial_model_knows_nothing() -> None:
    """All logits are 0, so every NLL is the log of the tokens that can be predicted."""
    tokens_BL = torch.randint(VOCAB - 1, (2, LENGTH))
    inputs, (rows, columns) = pack_groups(tokens_BL, torch.randint(2, (2, LENGTH)))
    nll = initialised(MODELS["pgm"])(inputs, readout=TokenNLL(tokens_BL[rows, columns], VOCAB - 1))
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(VOCAB - 1)))


def _drawn(seed: int) -> dict[str, Tensor]:
    """The tensors that are not constant, each as its first values between -1 and 1."""
    model = initialised(MODELS["pgm mlp4"], seed)
    random = {
        name: p.detach().flatten()[:8] for name, p in model.named_parameters() if p.unique().numel() > 1
    }
    return {name: values / values.abs().max() for name, values in random.items()}


def test_every_name_and_every_seed_has_values_of_its_own() -> None:
    streams = [*_drawn(1).values(), *_drawn(2).values()]
    assert len(streams) > 40
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in combinations(streams, 2))
    for name, values in _drawn(1).items():
        assert torch.equal(values, _drawn(1)[name])


def test_values_depend_on_no_global_generator_and_no_other_parameter() -> None:
    """A model with more blocks has the same values where the names are the same."""
    torch.manual_seed(5)
    small = initialised(MODELS["mdlm"])
    state = torch.get_rng_state()
    large = initialised(replace(MODELS["mdlm"], num_blocks=3))
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in small.named_parameters():
        assert torch.equal(large.get_parameter(name), parameter)


@contextmanager
def _rank(parallel: ParallelConfig, world_size: int, rank: int) -> Iterator[Mesh]:
    """One rank of a layout, alone: torch's fake process groups."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield Mesh(rank, world_size, rank, CPU).arranged(parallel)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _place(whole: Tensor, parameter: nn.Parameter) -> None:
    """Write a rank's part into the whole tensor; what pads it must be 0."""
    part, values = tensor_slice(parameter), parameter.detach().flatten()
    assert not values[part.numel :].any()
    columns = whole.view(-1, part.stride)[:, part.offset : part.offset + part.run]
    assert columns.isnan().all() or torch.equal(columns.flatten(), values[: part.numel])
    columns.copy_(values[: part.numel].view(columns.shape))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tensor", [2, 4])
def test_every_layout_starts_with_the_bits_of_one_process(name: str, tensor: int) -> None:
    for pipeline, vocab_size in ((1, VOCAB), (2, 5), (3, VOCAB)):
        config = MODELS[name]
        stage_units = (*[1] * (pipeline - 1), whole_span(config).last - pipeline + 1)
        parallel = ParallelConfig(tensor, pipeline)
        expected = dict(initialised(config, vocab_size=vocab_size).named_parameters())
        found = {key: torch.full_like(parameter, torch.nan) for key, parameter in expected.items()}
        for rank in range(tensor * pipeline):
            with _rank(parallel, tensor * pipeline, rank) as mesh:
                layers, span = layer_builder(mesh, parallel), stage_span(config, mesh, stage_units)
                part = build_part(config, vocab_size, LENGTH, layers, span, recomputes=False)
                materialize(part, 1, CPU, torch.float32)
            for key, parameter in part.named_parameters():
                _place(found[key], parameter)
        for key, parameter in expected.items():
            assert torch.equal(found[key], parameter), (key, tensor, pipeline)
