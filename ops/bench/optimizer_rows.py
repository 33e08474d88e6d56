"""Clip, AdamW and EMA of a 6/6 Partition Transformer, hidden size 768, as a run does them, against plain loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ops.bench.baselines.optimizer import PerTensorUpdate
from ops.bench.machine import Machine
from ops.bench.measure import Row, Side, Target, ratio, take_turns
from pgm_scale.config import DataConfig, PartitionTransformerConfig, RunConfig, TrainingConfig
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.launch import find_launch
from pgm_scale.parallel.mesh import connected
from pgm_scale.training.ema import ExponentialMovingAverage

MODEL = PartitionTransformerConfig(hidden_size=768, num_heads=12, num_encoder_blocks=6, num_decoder_blocks=6)
VOCAB, LENGTH, REPEATS = 50258, 1024, 5
# fp32: the gradient for its norm; gradient, weight, two moments in and the last three out; average, weight in and
# the average out.
BYTES_PER_PARAMETER = 4 * (1 + 4 + 3 + 3)


def rows(machine: Machine) -> Iterator[Row]:
    """One row: `Engine.step` and `ema.update` of one process, whose ZeRO-1 is ZeRO-0 in fp32.

    Both sides update the same weights and average from the same gradients; each has its own moments.
    """
    training = TrainingConfig(global_batch_sequences=1, micro_batch_sequences=1, precision="fp32")
    config = RunConfig(folder="", data=DataConfig("", ""), model=MODEL, training=training)
    with connected(find_launch({})) as mesh:
        engine = Engine.build(config, VOCAB, LENGTH, dataclasses.replace(mesh, device=machine.device))
        ema = ExponentialMovingAverage(engine.state, training.ema_decay)
        parameters = list(engine.module.parameters())
        gradients = [torch.randn_like(parameter) for parameter in parameters]
        optimizer = config.optimizer
        plain = PerTensorUpdate(
            parameters,
            optimizer.learning_rate,
            optimizer.betas,
            optimizer.epsilon,
            optimizer.weight_decay,
            optimizer.gradient_clip_norm,
            training.ema_decay,
        )

        plain.average = [values.view_as(p) for values, p in zip(ema.values, parameters, strict=True)]

        def update() -> None:
            engine.step(optimizer.learning_rate)
            ema.update()
            wait()

        def update_plainly() -> None:
            plain.step()
            wait()

        def wait() -> None:
            if machine.device.type == "cuda":
                torch.cuda.synchronize()

        def bring_back_gradients() -> None:
            """DeepSpeed drops them, and both sides clip them in place."""
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            torch._foreach_mul_(gradients, 2.0)

        elements = sum(parameter.numel() for parameter in parameters)
        work = float(BYTES_PER_PARAMETER * elements)
        sides = [
            Side("per tensor", update_plainly, undo=bring_back_gradients),
            Side("engine and EMA", update, work, "memory", undo=bring_back_gradients),
        ]
        bring_back_gradients()
        seconds = take_turns(sides, REPEATS)
        engine.close()
        yield Row(
            f"clip + AdamW + EMA, {elements / 1e6:.0f}M parameters, fp32",
            ratio(seconds, "per tensor", "engine and EMA"),
            "x",
            Target(5.0, 8.0),
            seconds,
            {"engine and EMA": work},
            machine.fractions(sides, seconds),
            "memory",
            f"{BYTES_PER_PARAMETER} bytes a parameter; ZeRO-0 and 1 are the same on one rank",
        )
