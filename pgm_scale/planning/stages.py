"""The pipeline stages of a layout: which units each one has, and what a micro-batch costs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pgm_scale.models.stages import Span, spans, stream_rows, unit_kinds
from pgm_scale.parallel.stages import split_units
from pgm_scale.planning.cluster import Hardware
from pgm_scale.planning.layouts import Layout, Sharing, Workload
from pgm_scale.planning.trace import Footprint, Quantities
from pgm_scale.planning.units import UnitCosts, keys_per_query


@dataclass
class Load(Quantities):
    """What a micro-batch costs some units of a rank; the sum of the units'.

    Attributes:
        held_bytes: kept for the backward pass.
        forward_s, backward_s: of the kernels, on the GPU.
        forward_kernels, backward_kernels: launched by the host.
        reduced_bytes, gathered_bytes, collectives: of the tensor-parallel group; see `trace.Work`.
    """

    held_bytes: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    forward_kernels: float = 0.0
    backward_kernels: float = 0.0
    reduced_bytes: float = 0.0
    gathered_bytes: float = 0.0
    collectives: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A pipeline stage on one rank, and what a micro-batch costs it.

    Attributes:
        kinds: of its units.
        parameters: their sizes in elements, and those of what every stage has.
        load: the units' together.
        received_bytes, sent_bytes: from the stage before and to the one after; 0 at the ends.
        held_bytes: kept for the backward pass; what has been sent is not.
        work_bytes: beside that, at the worst moment.
        in_flight: micro-batches whose activations 1F1B keeps at once.
    """

    kinds: tuple[str, ...]
    parameters: tuple[int, ...]
    load: Load
    received_bytes: float
    sent_bytes: float
    held_bytes: float
    work_bytes: float
    in_flight: int


class StageCosts:
    """Makes the stages of all layouts whose units cost the same."""

    def __init__(
        self,
        workload: Workload,
        sharing: Sharing,
        hardware: Hardware,
        costs: UnitCosts,
        slowdown: Mapping[str, float],
    ) -> None:
        """`slowdown` is by what the kernels of a kind of unit were measured to be slower; 1 if it is not in it."""
        self.workload, self.sharing, self.hardware, self.costs = workload, sharing, hardware, costs
        self.slowdown = slowdown
        self.kinds = unit_kinds(workload.model)
        self._splits: dict[int, tuple[int, ...]] = {}
        self._loads: dict[tuple[str, int], tuple[Load, float]] = {}
        self._sums: dict[tuple[tuple[str, ...], int], tuple[Load, float]] = {}

    def stages(self, layout: Layout) -> list[Stage]:
        rows = layout.micro_batch_sequences * self.workload.rows_per_sequence
        return [
            self._stage(span, rows, min(layout.pipeline - number, layout.micro_batches))
            for number, span in enumerate(spans(self.split(layout.pipeline)))
        ]

    def split(self, stages: int) -> tuple[int, ...]:
        """Units of each stage, by the time that they take on a rank with a micro-batch of a few sequences."""
        if stages not in self._splits:
            loads = {kind: self.unit(kind, _SPLIT_ROWS)[0] for kind in set(self.kinds)}
            seconds = {kind: load.forward_s + load.backward_s for kind, load in loads.items()}
            self._splits[stages] = split_units([seconds[kind] for kind in self.kinds], stages)
        return self._splits[stages]

    def _stage(self, span: Span, rows: int, in_flight: int) -> Stage:
        kinds = self.kinds[span.first : span.last]
        load, work_bytes = self._sum(kinds, rows)
        (received, received_beside), (sent, sent_beside) = (
            self._stream_bytes(unit, rows) for unit in (span.first, span.last)
        )
        own = sum((self.costs.parameters[kind] for kind in kinds), ())
        return Stage(
            kinds,
            own + self.costs.shared_parameters,
            load,
            received + received_beside,
            sent + sent_beside,
            held_bytes=received + received_beside + load.held_bytes - sent,
            work_bytes=work_bytes + received_beside + sent_beside,  # the gradients of the second streams
            in_flight=in_flight,
        )

    def _stream_bytes(self, unit: int, rows: int) -> tuple[float, float]:
        """Of the stream that passes into a unit between stages, and of the encoder's beside it, for the decoder."""
        if not 0 < unit < len(self.kinds):
            return 0.0, 0.0
        kind = self.kinds[unit]
        beside = self._bytes_into("group_swap", rows) if kind == "decoder_block" else 0.0
        return self._bytes_into(kind, rows) - beside, beside

    def _bytes_into(self, kind: str, rows: int) -> float:
        workload, ranks = self.workload, self.sharing.tensor if self.sharing.sequence_parallel else 1
        streamed = rows * stream_rows(workload.model, kind, workload.length)
        return streamed * workload.model.hidden_size * workload.dtype.itemsize / ranks

    def _sum(self, kinds: tuple[str, ...], rows: int) -> tuple[Load, float]:
        """The units' load, and the most that is alive beyond all that is held.

        The backward pass frees the later units first, so an early unit's work meets less than what is held.
        """
        if (kinds, rows) not in self._sums:
            once = self._of(self.costs.once.at(rows), 0.0, 1.0)
            total, peak_bytes = once, 0.0
            for kind in kinds:
                load, extra_bytes = self.unit(kind, rows)
                total = total + load
                peak_bytes = max(peak_bytes, total.held_bytes + extra_bytes)
            self._sums[kinds, rows] = (total, peak_bytes - total.held_bytes)
        return self._sums[kinds, rows]

    def unit(self, kind: str, rows: int) -> tuple[Load, float]:
        """Of one unit: its load, and its passes' extra bytes."""
        if (kind, rows) not in self._loads:
            footprint = self.costs.by_kind[kind].at(rows)
            keys = keys_per_query(self.workload.model, kind, self.workload.length)
            load = self._of(footprint, keys, self.slowdown.get(kind, 1.0))
            self._loads[kind, rows] = (load, footprint.extra_bytes)
        return self._loads[kind, rows]

    def _of(self, footprint: Footprint, keys: float, slowdown: float) -> Load:
        forward, backward = footprint.forward, footprint.backward
        rate = self.hardware.peak(self.workload.precision) * self.hardware.attention_fraction
        return Load(
            held_bytes=footprint.held_bytes,
            forward_s=(forward.kernel_s + forward.attention_flops_per_key * keys / rate) * slowdown,
            backward_s=(backward.kernel_s + backward.attention_flops_per_key * keys / rate) * slowdown,
            forward_kernels=forward.kernels,
            backward_kernels=backward.kernels,
            reduced_bytes=forward.reduced_bytes + backward.reduced_bytes,
            gathered_bytes=forward.gathered_bytes + backward.gathered_bytes,
            collectives=forward.collectives + backward.collectives,
        )


_SPLIT_ROWS = 4
