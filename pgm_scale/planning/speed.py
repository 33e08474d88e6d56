"""How long a step takes: a pipeline of the stages' times, then the gradients' reduction and the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgm_scale.models.flops import forward_flops_per_token
from pgm_scale.planning.cluster import Hardware
from pgm_scale.planning.layouts import Layout, Workload
from pgm_scale.planning.stages import Stage
from pgm_scale.planning.traffic import messages

# Bytes of memory traffic an element. AdamW reads weight, gradient and two moments and writes three of them; the
# EMA reads two and writes one; the weights to compute with are written once more.
_UPDATE_BYTES = 7 * 4 + 3 * 4 + 4 + 2
# ZeRO-1 in bf16 adds each micro-batch's gradients to fp32 ones (a cast, a sum) and zeroes them, and takes norm
# and clip over all of them; ZeRO-2 and 3 pass them through a bucket of about as much traffic.
_ACCUMULATION_BYTES = (2 + 4) + (4 + 4 + 4) + 2
_NORM_BYTES = 4 + 8 + 4
TEACHER_PASSES = 2  # forward, of a distillation; those of a PGM with one group are shorter


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and what they are made of; the slowest stage sets the pace.

    Attributes:
        passes_s: all micro-batches through all stages.
        reduction_s: data-parallel collectives.
        update_s: the optimizer.
        bubble: share of `passes_s` in which a stage of average speed waits for others to have work,
            (p - 1) / (m + p - 1) for equal stages.
        imbalance: the slowest stage's time over the average one's.
        host_bound: whether launching kernels takes longer than running them.
    """

    passes_s: float
    reduction_s: float
    update_s: float
    bubble: float
    imbalance: float
    host_bound: bool

    @property
    def total_s(self) -> float:
        return self.passes_s + self.reduction_s + self.update_s


def step_time(workload: Workload, layout: Layout, stages: Sequence[Stage], hardware: Hardware) -> StepTime:
    """1F1B: the first micro-batch passes every stage, the others follow at the pace of the slowest."""
    traffic = [messages(workload, layout, stage, hardware) for stage in stages]
    passes = layout.micro_batches
    during_s = [sum(m.seconds for m in sent if not m.name.startswith("data")) / passes for sent in traffic]
    data_s = [sum(m.seconds for m in sent if m.name.startswith("data")) for sent in traffic]
    times = [
        _micro_batch_s(workload, stage, waiting_s, hardware)
        for stage, waiting_s in zip(stages, during_s, strict=True)
    ]
    slowest, total = max(times), sum(times)
    passes_s = total + (passes - 1) * slowest
    average = total / len(times)
    return StepTime(
        passes_s,
        max(data_s),
        max(_update_s(layout, stage, hardware) for stage in stages),
        bubble=1 - passes * average / (passes_s - (passes - 1) * (slowest - average)),
        imbalance=slowest / average,
        host_bound=any(_host_s(stage, hardware) > _kernels_s(workload, stage, hardware) for stage in stages),
    )


def _micro_batch_s(workload: Workload, stage: Stage, waiting_s: float, hardware: Hardware) -> float:
    """Forward and backward: what the GPU runs, and waits for, or what the host takes to launch it."""
    return max(_kernels_s(workload, stage, hardware) + waiting_s, _host_s(stage, hardware))


def _kernels_s(workload: Workload, stage: Stage, hardware: Hardware) -> float:
    accumulated = _ACCUMULATION_BYTES * sum(stage.parameters) if workload.precision == "bf16" else 0.0
    taught_s = TEACHER_PASSES * stage.load.forward_s if workload.has_teacher else 0.0
    return taught_s + stage.load.forward_s + stage.load.backward_s + accumulated / _memory_rate(hardware)


def _host_s(stage: Stage, hardware: Hardware) -> float:
    return (stage.load.forward_kernels + stage.load.backward_kernels) * hardware.host_s_per_kernel


def _update_s(layout: Layout, stage: Stage, hardware: Hardware) -> float:
    elements = sum(stage.parameters)
    own = elements / layout.data if layout.zero_stage else elements
    counted = elements if layout.zero_stage <= 1 else own
    return (_UPDATE_BYTES * own + _NORM_BYTES * counted) / _memory_rate(hardware)


def _memory_rate(hardware: Hardware) -> float:
    return hardware.memory_bytes_per_s * hardware.memory_fraction


def model_flops(workload: Workload) -> float:
    """Of one step, recomputation not counted; backward is two forwards (PaLM, appendix B)."""
    each = forward_flops_per_token(workload.model, workload.vocab_size, workload.length)
    return 3 * each * workload.tokens * workload.rows_per_sequence
