"""A rank's part of a model: its initial weights in the engine, recomputed blocks, offloaded optimizer state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgm_scale.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from pgm_scale.models.layers import LOCAL_LAYERS
from pgm_scale.models.readout import TokenNLL
from pgm_scale.models.stages import whole_span
from pgm_scale.parallel.construction import build_part, materialize
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.micro_step import MicroStep
from tests.distributed import run_ranks
from tests.models.builders import HIDDEN, LENGTH, VOCAB, diffusion_config, pack_groups, partition_config
from tests.parallel.persistence import partition_everything

MICRO, SEED = 2, 1
CPU = torch.device("cpu")
PGM = partition_config(dropout=0.1)
LAYOUTS = {
    **{f"ZeRO-{stage}": ParallelConfig(zero_stage=stage) for stage in (0, 1, 2, 3)},
    "tensor": ParallelConfig(tensor=2),
    "tensor, ZeRO-3": ParallelConfig(tensor=2, zero_stage=3),
    "sequences, ZeRO-0": ParallelConfig(tensor=2, sequence_parallel=True, zero_stage=0),
    "pipeline": ParallelConfig(pipeline=2),
}


def _config(
    parallel: ParallelConfig, ranks: int, precision: Any = "fp32", recompute: bool = False
) -> RunConfig:
    data_ranks = ranks // (parallel.tensor * parallel.pipeline)
    return RunConfig(
        folder="",
        data=DataConfig("", ""),
        model=PGM,
        parallel=parallel,
        optimizer=OptimizerConfig(gradient_clip_norm=0.1, weight_decay=0.01, epsilon=1e-3),
        training=TrainingConfig(
            global_batch_sequences=2 * MICRO * data_ranks,
            micro_batch_sequences=MICRO,
            precision=precision,
            recompute_blocks=recompute,
            seed=SEED,
        ),
    )


def _engine(config: RunConfig, mesh: Mesh) -> Engine:
    return Engine.build(config, VOCAB, LENGTH, mesh.arranged(config.parallel), (4, 3))


def _local(config: ModelConfig, recompute: bool = False) -> nn.Module:
    model = build_part(config, VOCAB, LENGTH, LOCAL_LAYERS, whole_span(config), recompute)
    materialize(model, SEED, CPU, torch.float32)
    return model


def _initial_state(mesh: Mesh) -> None:
    """The fp32 weights that the ranks hold cover every parameter once a model copy, with one process's bits."""
    partition_everything()
    expected = {name: parameter.detach() for name, parameter in _local(PGM).named_parameters()}
    for name, precision in [
        *product(LAYOUTS, ["fp32"]),
        ("ZeRO-0", "bf16"),
        ("ZeRO-1", "bf16"),
        ("ZeRO-3", "bf16"),
    ]:
        engine = _engine(_config(LAYOUTS[name], mesh.world_size, precision), mesh)
        found = {key: torch.full_like(whole, math.nan) for key, whole in expected.items()}
        for entries in mesh.gather([(e.name, e.part, e.start, e.weight.numpy()) for e in engine.state]):
            for key, part, start, values in entries:
                places = part.take(torch.arange(found[key].numel()).view(part.global_shape))
                found[key].view(-1)[places[start : start + len(values)]] = torch.from_numpy(values)
        for key, whole in expected.items():
            # A bf16 model's fp32 weights start as its bf16 ones, but for ZeRO-0, which has no bf16 ones.
            rounded = whole.bfloat16().float() if precision == "bf16" and engine.zero_stage else whole
            assert torch.equal(found[key], rounded), (name, precision, key)
        assert engine.parameter_shapes == {key: tuple(whole.shape) for key, whole in expected.items()}
        if precision == "fp32":
            _evaluates_other_weights(engine)
        engine.close()


def _evaluates_other_weights(engine: Engine) -> None:
    """They reach every shard that computes with them, also those that ZeRO-3 has taken apart."""
    torch.manual_seed(0)
    other = _local(PGM).eval()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = [
        e.part.take(other.get_parameter(e.name).detach())[e.start : e.start + e.weight.numel()]
        for e in engine.state
    ]
    (inputs,), _ = _call(0)
    with torch.no_grad(), engine.evaluation(weights) as module:
        torch.testing.assert_close(module(inputs), other(inputs), rtol=1e-5, atol=1e-5)


def test_every_engine_starts_with_the_bits_of_one_process_and_takes_other_weights() -> None:
    run_ranks(2, _initial_state)


@dataclass(frozen=True)
class Run:
    """What some steps leave behind on a rank."""

    losses: list[float]
    norms: list[float]
    weights: list[Tensor]


def _call(number: int) -> tuple[tuple[Any, ...], TokenNLL]:
    """The model's arguments and readout for the micro-batch of that number."""
    generator = torch.Generator().manual_seed(number)
    tokens_BL = torch.randint(VOCAB - 1, (MICRO, LENGTH), generator=generator)
    inputs, (rows, columns) = pack_groups(tokens_BL, torch.randint(2, (MICRO, LENGTH), generator=generator))
    return (inputs,), TokenNLL(tokens_BL[rows, columns], VOCAB - 1)


def _seed(number: int) -> None:
    torch.manual_seed(number)


def _run(config: RunConfig, mesh: Mesh, steps: int) -> Run:
    engine = _engine(config, mesh)
    losses: list[float] = []

    def loss(nll: Tensor) -> Tensor:
        losses.append(float(nll.detach().mean()))
        return nll.mean() / engine.micro_steps / engine.mesh.data_ranks

    def step(number: int) -> MicroStep:
        return MicroStep(*_call(number), partial(_seed, number), loss)

    norms = []
    numbers = iter(range(engine.mesh.data_rank, 100, engine.mesh.data_ranks))
    for _ in range(steps):
        engine.forward_backward([step(next(numbers)) for _ in range(engine.micro_steps)])
        assert engine.step(1e-2)
        norms.append(engine.gradient_norm)
    if engine.zero_stage == 3:
        assert not any(parameter.numel() for parameter in engine.module.parameters())
    weights = [entry.weight.clone() for entry in engine.state]
    engine.close()
    return Run(losses, norms, weights)


def _recomputes(mesh: Mesh) -> None:
    partition_everything()
    cases = [(name, "fp32") for name in LAYOUTS] + [("ZeRO-0", "bf16"), ("sequences, ZeRO-0", "bf16")]
    for name, precision in cases:
        kept, recomputed = (
            _run(_config(LAYOUTS[name], mesh.world_size, precision, recompute), mesh, steps=2)
            for recompute in (False, True)
        )
        assert recomputed.losses == kept.losses, (name, precision)
        assert recomputed.norms == kept.norms, (name, precision)
        assert all(map(torch.equal, recomputed.weights, kept.weights)), (name, precision)


def test_recomputing_blocks_changes_no_bit() -> None:
    """Losses, gradient norms and weights, with dropout: the second forward pass drops the same elements."""
    run_ranks(2, _recomputes)


def _saved_bytes(model: nn.Module, *arguments: Any) -> int:
    """Memory of the tensors that a forward pass keeps for the backward pass, the weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = model(*arguments)
    assert result.requires_grad
    return sum(x.untyped_storage().nbytes() for x in saved.values())


@pytest.mark.parametrize("block", ["encoder", "decoder", "mdlm"])
def test_recomputing_blocks_keeps_no_more_than_their_input(block: str) -> None:
    """What another block adds to the memory of a forward pass is one tensor [T, H]; without, over ten."""
    tokens_BL = torch.randint(VOCAB, (32, LENGTH))
    packed = pack_groups(tokens_BL, torch.randint(2, (32, LENGTH)))[0]
    grow: Callable[[int], ModelConfig]
    if block == "mdlm":
        grow, arguments = lambda count: replace(diffusion_config(), num_blocks=count), (tokens_BL,)
    else:
        grow, arguments = lambda count: replace(PGM, **{f"num_{block}_blocks": count}), (packed,)
    stream_bytes = tokens_BL.numel() * HIDDEN * 4
    for recompute, least, most in ((True, 1, 1.1), (False, 10, 50)):
        small, large = (_saved_bytes(_local(grow(count), recompute), *arguments) for count in (2, 3))
        assert least * stream_bytes <= large - small <= most * stream_bytes, (recompute, large - small)


def _offloads(mesh: Mesh) -> None:
    partition_everything()
    cases = [(name, "fp32") for name in ("ZeRO-1", "ZeRO-2", "ZeRO-3", "tensor, ZeRO-3", "pipeline")]
    for name, precision in [*cases, ("ZeRO-1", "bf16"), ("pipeline", "bf16")]:
        held, offloaded = (
            _run(
                _config(replace(LAYOUTS[name], offload_optimizer=offload), mesh.world_size, precision),
                mesh,
                steps=4,
            )
            for offload in (False, True)
        )
        assert offloaded.norms == pytest.approx(held.norms, rel=1e-6), (name, precision)
        assert min(held.norms) > 0.2, "clipping to 0.1 must be at work"
        assert offloaded.losses == pytest.approx(held.losses, rel=1e-5), (name, precision)
        for one, other in zip(offloaded.weights, held.weights, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_offloading_the_optimizer_takes_the_same_steps() -> None:
    run_ranks(2, _offloads)
