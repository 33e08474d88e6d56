"""Forward and backward of a training step: against the dense-mask model, against MDLM, against the machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ops.bench.baselines.partition_transformer import DensePartitionTransformer
from ops.bench.bench_run import BenchRun
from ops.bench.machine import Machine
from ops.bench.measure import Row, Side, Target, ratio, take_turns
from ops.bench.models import LENGTH, MDLM, PGM, VOCABULARY, with_random_weights
from pgm_scale.config import (
    MODEL_SIZES,
    DiffusionTransformerConfig,
    MDLMObjectiveConfig,
    ModelConfig,
    ObjectiveConfig,
    PartitionTransformerConfig,
    PGMObjectiveConfig,
)
from pgm_scale.data.batch import TokenBatch
from pgm_scale.models import build_model
from pgm_scale.models.flops import forward_flops_per_token
from pgm_scale.objectives import build_objective
from pgm_scale.objectives.base import DrawSpec, loss_terms
from pgm_scale.objectives.pgm import PGMObjective
from pgm_scale.parallel.launch import find_launch
from pgm_scale.parallel.mesh import connected
from pgm_scale.training.metrics import peak_flops

SEQUENCES = 2
GLOBAL_BATCH_SEQUENCES = 64
REPEATS = 5
WARM_UPS = 5  # in the first steps a kept allocator still takes new memory, at the price of its first touch
CUDA_REPEATS = 20


def rows(machine: Machine) -> Iterator[Row]:
    return cuda_rows(machine) if machine.device.type == "cuda" else cpu_rows(machine)


def cpu_rows(machine: Machine) -> Iterator[Row]:
    ours, mdlm = step("PGM", PGM, PGMObjectiveConfig()), step("MDLM", MDLM, MDLMObjectiveConfig())
    sides = [ours, dense_mask_step(), mdlm]
    seconds = take_turns(sides, REPEATS, WARM_UPS)
    fractions = machine.fractions(sides, seconds)
    sizes = "L 1024, H 256, V 50,258, batch 2, dropout 0.1"
    for what, slow, target in (
        ("PGM 4/4 blocks, against dense masks", "dense masks", Target(2.0, 2.5)),
        ("PGM 4/4 blocks, against our MDLM of 8", "MDLM", Target(1.3, 1.6)),
    ):
        compared = {name: seconds[name] for name in ("PGM", slow)}
        yield Row(f"training step, {what}; {sizes}", ratio(seconds, slow, "PGM"), "x", target, compared)
    yield Row(
        f"training step, PGM 4/4 blocks, of the matmul peak; {sizes}",
        fractions["PGM"],
        "of peak",
        Target(0.42, 0.6),
        {"PGM": seconds["PGM"]},
        {"PGM": ours.work},
        fractions,
        ours.resource,
    )


def cuda_rows(machine: Machine) -> Iterator[Row]:
    """Whole training steps of one GPU in bf16, by the model FLOPs utilisation and against MDLM."""
    peak = peak_flops(machine.device, "bf16") or machine.peaks["bf16 matmul"]
    with tempfile.TemporaryDirectory() as folder, connected(find_launch({})) as mesh:
        for size, sequences, target in (
            ("pgm-6-6-1024", 32, Target(0.45, 0.55)),
            ("pgm-1.3b", 8, Target(0.55, 0.6)),
        ):
            pgm: Any = PartitionTransformerConfig(**_shape(size))
            blocks = pgm.num_encoder_blocks + pgm.num_decoder_blocks
            mdlm = DiffusionTransformerConfig(
                hidden_size=pgm.hidden_size, num_heads=pgm.num_heads, num_blocks=blocks
            )
            flops = 3 * sequences * LENGTH * forward_flops_per_token(pgm, VOCABULARY.size, LENGTH)
            runs = [
                BenchRun(Path(folder), mesh, model, objective, sequences, LENGTH)
                for model, objective in ((pgm, PGMObjectiveConfig()), (mdlm, MDLMObjectiveConfig()))
            ]
            sides = [
                Side("PGM", runs[0].step, flops, "bf16 matmul"),
                Side("MDLM", runs[1].step),
            ]
            seconds = take_turns(sides, CUDA_REPEATS, warm_ups=3)
            what = f"training step, {size}, bf16, L {LENGTH}, batch {sequences}"
            yield Row(
                f"{what}, of the GPU's rated FLOP/s",
                flops / median(seconds["PGM"]) / peak,
                "MFU",
                target,
                {"PGM": seconds["PGM"]},
                {"PGM": flops},
                machine.fractions(sides[:1], seconds),
                "bf16 matmul",
            )
            yield Row(f"{what}, against MDLM", ratio(seconds, "MDLM", "PGM"), "x", Target(1.15, 1.3), seconds)
            del runs, sides
            torch.cuda.empty_cache()


def _shape(size: str) -> dict[str, Any]:
    return {key: value for key, value in MODEL_SIZES[size].items() if key != "kind"}


def step(name: str, config: ModelConfig, objective_config: ObjectiveConfig) -> Side:
    """Forward and backward of our model on one micro-batch, on the draws of training."""
    model = with_random_weights(build_model(config, VOCABULARY.size, LENGTH))
    objective = build_objective(objective_config, VOCABULARY)
    inputs = objective.training_inputs(batch(), DrawSpec(1, GLOBAL_BATCH_SEQUENCES))

    def loss() -> Any:
        return loss_terms(objective, model, inputs).loss_S.sum() / (SEQUENCES * LENGTH)

    flops = 3 * SEQUENCES * LENGTH * forward_flops_per_token(config, VOCABULARY.size, LENGTH)
    return Side(name, lambda: _backward(model, loss), flops, "fp32 matmul")


def dense_mask_step() -> Side:
    """The same on the model as published; equal weights, the same tokens and groups."""
    ours = with_random_weights(build_model(PGM, VOCABULARY.size, LENGTH))
    model = DensePartitionTransformer.from_state(ours.state_dict(), PGM, LENGTH).train()
    objective = PGMObjective(PGMObjectiveConfig(), VOCABULARY)
    partition = objective.training_partition(batch(), DrawSpec(1, GLOBAL_BATCH_SEQUENCES))
    tokens_BL = torch.from_numpy(batch().tokens_BL)
    in_group1_BL = torch.from_numpy(partition.in_group1_BL)
    weight_B2 = torch.from_numpy(partition.weight_B2).float()
    weight_BL = torch.where(in_group1_BL, weight_B2[:, :1], weight_B2[:, 1:])

    def loss() -> torch.Tensor:
        return model.training_loss(tokens_BL, in_group1_BL, weight_BL, VOCABULARY.mask_id)

    return Side("dense masks", lambda: _backward(model, loss))


def batch() -> TokenBatch:
    tokens_BL = np.random.default_rng(0).integers(0, 50_000, (SEQUENCES, LENGTH))
    return TokenBatch(tokens_BL, np.ones_like(tokens_BL, dtype=bool), np.arange(SEQUENCES))


def _backward(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    loss().backward()
