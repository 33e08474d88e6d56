"""Bytes that a rank holds, part by part, as DeepSpeed 0.19 and this package's engine keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from pgm_scale.parallel.layout import applied_zero_stage
from pgm_scale.planning.layouts import Layout, Workload
from pgm_scale.planning.stages import Stage

FP32, BF16 = 4, 2
# DeepSpeed's defaults, in elements; the engine keeps them.
BUCKET = 500_000_000  # gradients that ZeRO-2 and 3 gather before they reduce them, allocated whole
SUB_GROUP = 1_000_000_000  # of ZeRO-3's partition, which is updated in such portions
LIVE_WEIGHTS = 1_000_000_000  # that ZeRO-3 keeps gathered
PERSISTENT = 100_000  # ZeRO-3 leaves parameters of at most this size whole


@dataclass(frozen=True)
class RankMemory:
    """Peak bytes of one rank.

    Attributes:
        weights: what the model computes with.
        gradients: their sums over the micro-batches, to which ZeRO-1 in bf16 adds each as soon as it is there.
        master: fp32 weights that the optimizer updates, where they are not the weights themselves.
        moments: Adam's two.
        ema: of the weights.
        activations: kept for the backward pass, of all micro-batches in flight.
        work: what the passes need beside that at the worst moment; logits and their gradient, mostly.
        buffers: DeepSpeed's, for reducing gradients and gathering weights.
        teacher: the weights of a distillation's frozen model (`parallel.frozen`).
    """

    weights: float
    gradients: float
    master: float
    moments: float
    ema: float
    activations: float
    work: float
    buffers: float
    teacher: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def rank_memory(workload: Workload, layout: Layout, stage: Stage) -> RankMemory:
    """The peak of a rank of this stage.

    Activations are at their peak while the first micro-batch that is still in flight goes backward. Reductions
    of gradients meet that peak only where the gradients overflow a bucket: otherwise they follow the pass.
    """
    zero_stage = applied_zero_stage(
        layout.zero_stage, layout.data, workload.precision, needs_partitions=layout.pipeline > 1
    )
    states = _states(stage.parameters, layout.data, zero_stage, workload)
    standing, reduction = _buffers(stage.parameters, layout.data, zero_stage, workload)
    held, work = stage.held_bytes * stage.in_flight, stage.work_bytes
    if sum(stage.parameters) <= BUCKET:
        reduction = max(0.0, reduction - held - work)
    teacher = _teacher(stage.parameters, layout.data, zero_stage, workload) if workload.has_teacher else 0.0
    return RankMemory(*states, held, work, standing + reduction, teacher)


def _teacher(parameters: Sequence[int], ranks: int, zero_stage: int, workload: Workload) -> float:
    """In the type that the model computes with, whole but under ZeRO-3."""
    held = sum(ceil(n / ranks) if zero_stage == 3 else n for n in parameters)
    return (FP32 if zero_stage == 0 else workload.dtype.itemsize) * held


def _states(
    parameters: Sequence[int], ranks: int, zero_stage: int, workload: Workload
) -> tuple[float, float, float, float, float]:
    """Weights, gradients, master weights, moments and EMA.

    ZeRO-1 and 2 lay the parameters end to end and pad to 2 elements a rank; ZeRO-3 splits each on its own.
    """
    elements, weight_bytes = sum(parameters), workload.dtype.itemsize
    flat = ceil(elements / (2 * ranks)) * 2 * ranks
    share = sum(ceil(n / ranks) for n in parameters) if zero_stage == 3 else flat / ranks
    ema = FP32 * min(share, elements) * workload.has_ema
    if zero_stage == 0:
        return FP32 * elements, FP32 * elements, 0.0, 2 * FP32 * elements, FP32 * elements * workload.has_ema
    if zero_stage == 3:
        persistent = sum(n for n in parameters if n <= PERSISTENT)
        weights = weight_bytes * (share + persistent)
        gradients = FP32 * share
    else:
        weights = weight_bytes * flat
        gradients = FP32 * share if zero_stage == 2 else FP32 * flat
    return weights, gradients, FP32 * share, 2 * FP32 * share, ema


def _buffers(
    parameters: Sequence[int], ranks: int, zero_stage: int, workload: Workload
) -> tuple[float, float]:
    """Buffers that stand during the passes, and what a reduction allocates besides.

    ZeRO-2 (and ZeRO-1 in fp32) fill a bucket, copy it flat and, in bf16, once more in fp32 to sum it over the
    ranks. ZeRO-3 fills an fp32 one and copies it in the order of the ranks; its gathered weights are counted
    here, as is the optimizer's portion of gradients in fp32, which is allocated from the start.
    """
    elements, weight_bytes = sum(parameters), workload.dtype.itemsize
    filled = min(BUCKET, elements)
    if zero_stage == 3:
        gathered = weight_bytes * min(LIVE_WEIGHTS, elements)
        portion = FP32 * min(SUB_GROUP, ceil(elements / ranks))
        return FP32 * BUCKET + gathered + portion, FP32 * filled
    if zero_stage == 2 or (zero_stage == 1 and weight_bytes == FP32):
        return weight_bytes * BUCKET, filled * (weight_bytes + (FP32 if weight_bytes == BF16 else 0))
    return 0.0, 0.0
