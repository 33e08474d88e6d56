"""Proof that a recommended layout can be built: every rank's part made, and a micro-batch sent through all stages.

With the real layers and groups of any rank of the whole cluster, on tensors without storage, so one machine does
it in seconds. Data-parallel copies are alike: one of each (tensor rank, stage) is built.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pgm_scale.config import ParallelConfig
from pgm_scale.models import build_model
from pgm_scale.models.initialization import is_split, tensor_slice
from pgm_scale.models.stages import Span, is_shared, spans
from pgm_scale.parallel.construction import build_part, layer_builder, stage_span
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.unit_costs import ExampleBatch, backward, stage_forward
from pgm_scale.planning.cluster import Hardware
from pgm_scale.planning.layouts import Layout, Workload
from pgm_scale.planning.memory import rank_memory
from pgm_scale.planning.pretend import META, pretended_rank
from pgm_scale.planning.stages import Stage
from pgm_scale.planning.trace import Footprint, trace_passes
from pgm_scale.tensor_slices import TensorSlice

# How far the sum over units may be from a trace of their stage, as a share of all that the rank holds.
MEMORY_TOLERANCE = 0.02
_NEGLIGIBLE_BYTES = 1 << 26  # of a tiny model a few tensors of a step are more than the tolerance


@dataclass(frozen=True)
class DryBuild:
    """What was built.

    Attributes:
        parts: distinct (tensor rank, stage) pairs.
        parameters: elements of the whole model, each counted once.
        largest_memory_error: how far a stage's traced activations are from the predicted ones, as a share of
            all that its ranks hold.
        problems: what was wrong, one line each; empty if the layout is proved.
    """

    parts: int
    parameters: int
    largest_memory_error: float
    problems: tuple[str, ...]


def dry_build(workload: Workload, layout: Layout, stages: Sequence[Stage], hardware: Hardware) -> DryBuild:
    """Build all parts of a layout and run its stages once."""
    stage_units = tuple(len(stage.kinds) for stage in stages)
    parallel = parallel_config(layout, stage_units)
    whole = _whole_shapes(workload)
    held: dict[str, list[TensorSlice]] = defaultdict(list)
    problems: list[str] = []
    errors = [0.0]
    for tensor_rank in range(layout.sharing.tensor):
        # Another stage for each tensor rank, so that the groups of all of them are looked at.
        stage = tensor_rank % layout.pipeline
        rank = tensor_rank + layout.sharing.tensor * layout.data * stage
        with pretended_rank(parallel, layout.gpus, rank) as mesh:
            problems += _place_problems(workload, layout, stage_units, mesh, (tensor_rank, stage))
            builder = _Builder(workload, layout, mesh, parallel)
            for span in spans(stage_units):
                for name, part in _own_slices(builder.part(span), tensor_rank, span):
                    held[name].append(part)
            if tensor_rank == layout.sharing.tensor - 1:
                problems += builder.run(stages, spans(stage_units), hardware, errors)
    problems += _cover_problems(whole, held)
    elements = sum(part.numel for parts in held.values() for part in parts)
    parts = layout.sharing.tensor * layout.pipeline
    return DryBuild(parts, elements, max(errors), tuple(problems))


def parallel_config(layout: Layout, stage_units: tuple[int, ...]) -> ParallelConfig:
    """The section of a run's configuration."""
    return ParallelConfig(
        tensor=layout.sharing.tensor,
        pipeline=layout.pipeline,
        sequence_parallel=layout.sharing.sequence_parallel,
        stage_units=stage_units if layout.pipeline > 1 else (),
        zero_stage=layout.zero_stage,  # type: ignore[arg-type]
    )


def _whole_shapes(workload: Workload) -> dict[str, tuple[int, ...]]:
    with META:
        model = build_model(workload.model, workload.vocab_size, workload.length)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _place_problems(
    workload: Workload, layout: Layout, stage_units: tuple[int, ...], mesh: Mesh, place: tuple[int, int]
) -> Iterator[str]:
    sizes = (mesh.tensor_ranks, mesh.stages, mesh.data_ranks)
    if sizes != (layout.sharing.tensor, layout.pipeline, layout.data):
        yield f"rank {mesh.rank}: groups of {sizes} tensor ranks, stages and data ranks instead of the layout's"
    if (mesh.tensor_rank, mesh.stage) != place:
        yield f"rank {mesh.rank}: tensor rank and stage are {(mesh.tensor_rank, mesh.stage)}, not {place}"
    if stage_span(workload.model, mesh, stage_units) != spans(stage_units)[place[1]]:
        yield f"rank {mesh.rank}: another span than stage {place[1]}'s"


def _own_slices(part: nn.Module, tensor_rank: int, span: Span) -> Iterator[tuple[str, TensorSlice]]:
    """What this part holds that no part before it does."""
    for name, parameter in part.named_parameters():
        if (is_split(parameter) or tensor_rank == 0) and (span.first == 0 or not is_shared(name)):
            yield name, tensor_slice(parameter)


def _cover_problems(whole: dict[str, tuple[int, ...]], held: dict[str, list[TensorSlice]]) -> Iterator[str]:
    """Whether the slices of each parameter follow each other without gap or overlap, and none is missing."""
    for name in whole.keys() | held.keys():
        parts = sorted(held.get(name, []), key=lambda part: part.offset)
        if {part.global_shape for part in parts} != {whole.get(name)}:
            yield f"{name}: held in shapes {[part.global_shape for part in parts]}, whole {whole.get(name)}"
            continue
        end = 0
        for part in parts:
            if part.offset != end:
                yield f"{name}: a gap or an overlap at {end} of {part.stride}"
            end = part.offset + part.run
        if end != parts[0].stride:
            yield f"{name}: only {end} of {parts[0].stride} are held"


@dataclass(frozen=True)
class _Builder:
    """Makes and runs parts as one rank of the cluster."""

    workload: Workload
    layout: Layout
    mesh: Mesh
    parallel: ParallelConfig

    def part(self, span: Span) -> nn.Module:
        workload = self.workload
        layers = layer_builder(self.mesh, self.parallel)
        return build_part(
            workload.model, workload.vocab_size, workload.length, layers, span, self.layout.recompute
        )

    def run(
        self, stages: Sequence[Stage], stage_spans: Sequence[Span], hardware: Hardware, errors: list[float]
    ) -> Iterator[str]:
        """A micro-batch forward and backward through each stage, which gets what the one before sends."""
        rows = self.layout.micro_batch_sequences * self.workload.rows_per_sequence
        batch = ExampleBatch(self.workload.vocab_size, self.workload.length, rows, META)
        sent: tuple[int, ...] = ()
        for number, (stage, span) in enumerate(zip(stages, stage_spans, strict=True)):
            footprint, shape, expected = self._passes(span, batch, hardware)
            if number and sent != expected:
                yield f"stage {number}: is sent {sent}, expects {expected}"
            sent = shape
            wrong_bytes = _memory_error(stage, footprint)
            error = wrong_bytes / rank_memory(self.workload, self.layout, stage).total
            errors.append(error)
            if error > MEMORY_TOLERANCE and wrong_bytes > _NEGLIGIBLE_BYTES:
                yield f"stage {number}: activations are {error:.1%} of its memory off the predicted ones"

    def _passes(
        self, span: Span, batch: ExampleBatch, hardware: Hardware
    ) -> tuple[Footprint, tuple[int, ...], tuple[int, ...]]:
        """The footprint, the shape of the result and the shape of what the stage expects to be sent."""
        workload, dtype = self.workload, self.workload.dtype
        part: Any = self.part(span)
        for parameter in part.parameters():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = torch.empty_like(parameter)
        sharing = self.layout.sharing
        ranks = sharing.tensor if sharing.sequence_parallel else 1
        forward = stage_forward(part, workload.model, span.first, batch, dtype, ranks)
        footprint = trace_passes(forward, backward, hardware, workload.precision)
        shape = tuple(forward().shape)
        rows = part.rows_before(span.first, *batch.model_arguments(workload.model)) // ranks
        return footprint, shape, (rows, workload.model.hidden_size)


def _memory_error(stage: Stage, traced: Footprint) -> float:
    """Bytes, for all micro-batches in flight. What is sent is freed; what is received was there before."""
    held = traced.held_bytes - stage.sent_bytes + stage.received_bytes
    predicted = stage.held_bytes * stage.in_flight + stage.work_bytes
    return abs(predicted - held * stage.in_flight - traced.extra_bytes)
