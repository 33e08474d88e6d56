"""One training step: the micro-batches' gradients, the agreement of all ranks, the update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pgm_scale.config import RunConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.objectives.base import DrawSpec, LossTerms, Objective
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.micro_step import MicroStep
from pgm_scale.parallel.optimizer import learning_rate
from pgm_scale.training.checkpointing import Checkpointer
from pgm_scale.training.diagnosis import have_bad_gradients
from pgm_scale.training.ema import ExponentialMovingAverage
from pgm_scale.training.stability import Instability, Stability
from pgm_scale.watching.fingerprint import fingerprint


@dataclass(frozen=True)
class MicroBatch:
    """What the reading thread prepares: an objective's inputs on the host, and what they count for."""

    inputs: Any
    scored_tokens: int
    sample_numbers_B: np.ndarray
    fingerprint: int


def prepare_micro_batch(objective: Objective, batch: TokenBatch, draws: DrawSpec) -> MicroBatch:
    inputs = objective.training_inputs(batch, draws)
    scored_tokens = objective.loss_tokens(batch, inputs)
    return MicroBatch(inputs, scored_tokens, batch.sample_numbers_B, fingerprint(batch))


class Agreement(NamedTuple):
    """What all ranks know of each other after the backward pass: whether it is so on any of them.

    Attributes:
        save_writes, save_failed: of the save under way: a rank still writes its part, or could not.
        too_late_to_save: a save that is started now may not end before the job does.
    """

    loss_not_finite: bool
    stop_requested: bool
    save_writes: bool
    save_failed: bool
    too_late_to_save: bool

    @property
    def save_ended(self) -> bool:
        return self.save_failed or not self.save_writes


@dataclass(frozen=True)
class StepResult:
    """Global values of one step, equal on all ranks, and this rank's terms (last stage) and data for the log.

    Attributes:
        instability: why the step was not learnt from: no rank has updated anything; else None.
        fingerprint: of this rank's sequences, see `watching.fingerprint`.
        sample_numbers: the lowest and the highest of this rank's.
    """

    loss: float
    scored_tokens: int
    gradient_norm: float
    learning_rate: float
    agreed: Agreement
    instability: Instability | None
    terms: list[LossTerms]
    fingerprint: int
    sample_numbers: tuple[int, int]


def training_step(
    step: int,
    engine: Engine,
    objective: Objective,
    micro_batches: Iterator[MicroBatch],
    ema: ExponentialMovingAverage | None,
    config: RunConfig,
    mesh: Mesh,
    checkpointer: Checkpointer,
    stability: Stability,
    stop_requested: bool,
    too_late_to_save: bool = False,
) -> StepResult:
    """Update the weights with the mean loss over the scored tokens of the global batch, if it is sane."""
    mesh.progress(f"reading the data of step {step}", step)
    batches = [next(micro_batches) for _ in range(engine.micro_steps)]
    scored_tokens = float(mesh.sum(np.array([sum(b.scored_tokens for b in batches)], np.float64))[0])
    # Tensor-parallel ranks drop the same of the same tokens; with sequence parallelism each has its own tokens.
    place = (mesh.data_rank, mesh.stage, mesh.tensor_rank if config.parallel.sequence_parallel else 0)
    losses: list[torch.Tensor] = []
    kept: list[LossTerms] = []

    def micro_step(number: int, inputs: Any) -> MicroStep:
        def loss(result: Any) -> torch.Tensor:
            terms = objective.terms(result, inputs)
            share = terms.loss_S.sum() / max(scored_tokens, 1)  # a distillation's batch may mask nothing
            losses.append(share.detach().double())
            kept.append(terms)
            return share

        def begin() -> None:
            mesh.progress(f"step {step}, micro-batch {number}")
            seed_dropout(config.training.seed, step, number, *place)

        call = objective.call(inputs)
        return MicroStep(call.arguments, call.readout, begin, loss)

    def micro_steps() -> Iterator[MicroStep]:
        return (micro_step(number, batch.inputs.to(mesh.device)) for number, batch in enumerate(batches))

    engine.forward_backward(micro_steps())
    loss = float(sum(losses))  # 0 on the stages of a pipeline that do not compute it
    saving = (checkpointer.is_writing, checkpointer.has_failed)
    flags = Agreement(not math.isfinite(loss), stop_requested, *saving, too_late_to_save)
    agreed = Agreement(*map(bool, mesh.any(np.array(flags, np.float64))))
    total = float(mesh.sum(np.array([loss]))[0])
    global_loss = math.nan if agreed.loss_not_finite else total
    rate = learning_rate(config.optimizer, step, config.training.steps)
    checkpointer.wait_until_copied()
    mesh.progress(f"update of step {step}")
    instability = _update(engine, ema, global_loss, rate, stability, mesh)
    if instability is not None:
        bad = [not math.isfinite(share) for share in losses]
        if instability.kind == "non_finite" and not agreed.loss_not_finite:
            bad = have_bad_gradients(engine, micro_steps())
        instability = instability._replace(where=_where(bad, batches, mesh))
    norm, data = engine.gradient_norm, sum(batch.fingerprint for batch in batches)
    span = _span(batches)
    return StepResult(global_loss, int(scored_tokens), norm, rate, agreed, instability, kept, data, span)


def _update(
    engine: Engine,
    ema: ExponentialMovingAverage | None,
    loss: float,
    rate: float,
    stability: Stability,
    mesh: Mesh,
) -> Instability | None:
    """Clip, update and average, on all ranks or on none; or why not."""
    agreed_norm = math.nan

    def accepts(norm: float) -> bool:
        nonlocal agreed_norm
        # Whether it is finite is the same everywhere, and so, for a spike, must its last bit be.
        agreed_norm = float(mesh.any(np.array([norm]))[0]) if stability.watches_spikes else norm
        return stability.judge(loss, agreed_norm) is None

    if not engine.step(rate, accepts):
        return stability.judge(loss, agreed_norm)
    stability.learnt(loss, agreed_norm)
    if ema is not None:
        ema.update()
    return None


def seed_dropout(*coordinates: int) -> None:
    """Dropout is a function of the seed, the step and the place, so a resume needs no generator's state."""
    words = np.random.SeedSequence(coordinates).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]) >> 1)


def _span(batches: list[MicroBatch]) -> tuple[int, int]:
    """The lowest and the highest sample number."""
    numbers = np.concatenate([batch.sample_numbers_B for batch in batches])
    return int(numbers.min()), int(numbers.max())


def _where(bad: list[bool], batches: list[MicroBatch], mesh: Mesh) -> str:
    """The ranks that have `bad` micro-batches, with their samples; all ranks if none has, or it cannot be told."""
    spans = [_span([batch]) for batch, is_bad in zip(batches, bad, strict=False) if is_bad]
    ranges = ", ".join(f"{low} to {high}" for low, high in spans)
    reports = mesh.gather((f"rank {mesh.rank} (samples {ranges})" if spans else "", _span(batches)))
    lowest, highest = min(low for _, (low, _) in reports), max(high for _, (_, high) in reports)
    return (
        ", ".join(report for report, _ in reports if report) or f"all ranks (samples {lowest} to {highest})"
    )
