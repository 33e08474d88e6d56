"""What one unit of each kind costs a rank: memory, time and traffic, for any micro-batch.

A stage's cost is the sum over its units (plus what it has once), and a unit's is the difference between two
short spans that differ by it, traced in the model's own code on a tensor-parallel rank. Everything grows in
straight lines with the micro-batch, so a few sizes tell all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    MaskGITTransformerConfig,
    ParallelConfig,
    PartitionTransformerConfig,
    TransformerConfig,
)
from pgm_scale.models.chunking import chunk_rows
from pgm_scale.models.flops import partition_sizes
from pgm_scale.models.layers import LayerBuilder
from pgm_scale.models.stages import Span, is_shared, stream_rows, unit_kinds
from pgm_scale.parallel.construction import build_part, layer_builder
from pgm_scale.parallel.layout import shared_tokens
from pgm_scale.parallel.unit_costs import ExampleBatch, backward, stage_forward
from pgm_scale.planning.cluster import Hardware
from pgm_scale.planning.layouts import Sharing, Workload
from pgm_scale.planning.pretend import META, pretended_rank
from pgm_scale.planning.trace import Footprint, trace_passes


@dataclass(frozen=True)
class Curve:
    """A footprint by the sequences of a micro-batch: straight lines through the sizes that were traced.

    Attributes:
        points: at least two, by ascending size; the outer lines go on beyond them.
    """

    points: tuple[tuple[int, Footprint], ...]

    def at(self, sequences: int) -> Footprint:
        lines = list(pairwise(self.points))
        (low, at_low), (high, at_high) = next((line for line in lines if sequences <= line[1][0]), lines[-1])
        return at_low + (at_high - at_low) * ((sequences - low) / (high - low))

    def __sub__(self, other: Curve) -> Curve:
        """Of two curves through the same sizes."""
        return Curve(
            tuple((n, own - its) for (n, own), (_, its) in zip(self.points, other.points, strict=True))
        )

    def with_extra_of(self, other: Curve) -> Curve:
        """This curve with the other's `extra_bytes`."""
        pairs = zip(self.points, other.points, strict=True)
        return Curve(tuple((n, replace(own, extra_bytes=its.extra_bytes)) for (n, own), (_, its) in pairs))


@dataclass(frozen=True)
class UnitCosts:
    """Of one variant on one kind of GPU.

    Attributes:
        by_kind: what a unit adds to its stage; `extra_bytes` is what its passes need beside what is held.
        once: what each stage has besides, whatever its units: rotary tables and the condition.
        parameters: sizes in elements of the parameters of a unit of each kind, padding included.
        shared_parameters: of those that every stage has.
    """

    by_kind: dict[str, Curve]
    once: Curve
    parameters: dict[str, tuple[int, ...]]
    shared_parameters: tuple[int, ...]


def unit_costs(workload: Workload, sharing: Sharing, hardware: Hardware) -> tuple[UnitCosts, UnitCosts]:
    """Trace every kind of unit on one tensor-parallel rank: without and with recomputation of the blocks."""
    workload = replace(workload, model=_two_of_each_block(workload.model))
    parallel = ParallelConfig(tensor=sharing.tensor, sequence_parallel=sharing.sequence_parallel)
    kinds = tuple(dict.fromkeys(unit_kinds(workload.model)))
    # The last rank, which has the mask token and the padding of the vocabulary, and masks their logits.
    with pretended_rank(parallel, sharing.tensor, rank=sharing.tensor - 1) as mesh:
        probe = _Probe(workload, sharing, hardware, layer_builder(mesh, parallel))
        by_kind = {kind: probe.unit(kind) for kind in kinds}
        block = [kind for kind in kinds if _is_block(kind)][-1]  # a decoder's block reads both rotary tables
        kept = UnitCosts(
            by_kind,
            once=probe.span(block) - by_kind[block],
            parameters={kind: probe.parameters(kind, shared=False) for kind in kinds},
            shared_parameters=probe.parameters(block, shared=True),
        )
        recomputed = {kind: probe.unit(kind, recompute=True) for kind in kinds if _is_block(kind)}
        return kept, replace(kept, by_kind=by_kind | recomputed)


def keys_per_query(model: TransformerConfig, kind: str, length: int) -> float:
    """Keys that a query attends to in a unit of this kind, on average, as `models.flops` counts them."""
    if isinstance(model, PartitionTransformerConfig):
        sizes = partition_sizes(model, length)
        return sizes.own_keys if kind == "encoder_block" else sizes.other_keys
    if isinstance(model, AutoregressiveTransformerConfig):
        return (length + 1) / 2
    if isinstance(model, MaskGITTransformerConfig):
        return float(stream_rows(model, kind, length))
    return float(length)


def _is_block(kind: str) -> bool:
    return kind.endswith("block")


def _two_of_each_block(model: TransformerConfig) -> TransformerConfig:
    if isinstance(model, PartitionTransformerConfig):
        return replace(model, num_encoder_blocks=2, num_decoder_blocks=2)
    return replace(model, num_blocks=2)


_MANY = 64


class _Probe:
    """Traces short spans of a model that has two blocks of each kind."""

    def __init__(
        self, workload: Workload, sharing: Sharing, hardware: Hardware, layers: LayerBuilder
    ) -> None:
        self.workload, self.sharing, self.hardware, self.layers = workload, sharing, hardware, layers
        self.kinds = unit_kinds(workload.model)
        self._spans: dict[tuple[bool, *tuple[str, ...]], Curve] = {}

    def unit(self, kind: str, recompute: bool = False) -> Curve:
        """What a unit adds to the stage of a neighbour; its passes' extra memory is that of the unit alone."""
        alone, neighbours = self.span(kind, recompute=recompute), self._neighbours(kind)
        unit_first = self.kinds.index(kind) < self.kinds.index(neighbours[0])
        together = (kind, *neighbours) if unit_first else (*neighbours, kind)
        own = self.span(*together, recompute=recompute) - self.span(*neighbours, recompute=recompute)
        return own.with_extra_of(alone)

    def _neighbours(self, kind: str) -> tuple[str, ...]:
        """Blocks next to a unit that make stages which end with a single stream, with the unit and without."""
        if _is_block(kind):
            return (kind,)
        before, after = self.kinds[: self.kinds.index(kind)], self.kinds[self.kinds.index(kind) + 1 :]
        return after[:2] if after else before[-1:]

    def span(self, *kinds: str, recompute: bool = False) -> Curve:
        """The footprint of a stage of these consecutive units, the last such ones of the model."""
        if (recompute, *kinds) not in self._spans:
            self._spans[recompute, *kinds] = self._trace(kinds, recompute)
        return self._spans[recompute, *kinds]

    def parameters(self, kind: str, shared: bool) -> tuple[int, ...]:
        stage, _ = self._stage((kind,), recompute=False)
        return tuple(p.numel() for name, p in stage.named_parameters() if is_shared(name) == shared)

    def _stage(self, kinds: tuple[str, ...], recompute: bool) -> tuple[nn.Module, int]:
        """The module of a span, and its first unit."""
        last = max(i for i in range(len(self.kinds) + 1) if self.kinds[i - len(kinds) : i] == kinds)
        first, workload = last - len(kinds), self.workload
        stage = build_part(
            workload.model,
            workload.vocab_size,
            workload.length,
            self.layers,
            Span(first, last),
            recompute,
        )
        return stage, first

    def _trace(self, kinds: tuple[str, ...], recompute: bool) -> Curve:
        workload, dtype = self.workload, self.workload.dtype
        stage, first = self._stage(kinds, recompute)
        for parameter in stage.parameters():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = torch.empty_like(parameter)  # as after the first micro-batch

        def footprint(sequences: int) -> Footprint:
            batch = ExampleBatch(workload.vocab_size, workload.length, sequences, META)
            ranks = self.sharing.tensor if self.sharing.sequence_parallel else 1
            forward = stage_forward(stage, workload.model, first, batch, dtype, ranks)
            return trace_passes(forward, backward, self.hardware, workload.precision)

        return Curve(tuple((sequences, footprint(sequences)) for sequences in self._sizes()))

    def _sizes(self) -> list[int]:
        """Micro-batches to trace: the least, those around a full chunk of logits, two full ones, and many.

        A peak is the larger of what grows with the batch and what does not (the gradient of a weight): the
        straight line through two sizes is not below it between them. What stops growing has a size of its own:
        logits are alive while those of the next chunk are made.
        """
        workload, tensor = self.workload, self.sharing.tensor
        # Sequence parallelism shares the tokens evenly.
        divides = not any(n % tensor for n in shared_tokens(workload.model, workload.length))
        least = 1 if divides else tensor
        many = _MANY * least
        rows = chunk_rows(-(-workload.vocab_size // tensor), "cuda")
        predicted = least * stream_rows(workload.model, "output", workload.length)
        below, two = (min(chunks * rows // predicted * least, many) for chunks in (1, 2))
        return sorted({least, max(below, least), below + least, max(two, least), 2 * many})
