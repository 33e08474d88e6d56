"""Bytes that a rank sends in one step, collective by collective, and the seconds that they take."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from pgm_scale.planning.cluster import Hardware, Link
from pgm_scale.planning.layouts import Layout, Workload
from pgm_scale.planning.memory import BUCKET, FP32, PERSISTENT
from pgm_scale.planning.stages import Stage


@dataclass(frozen=True)
class Message:
    """All collectives of one kind that a rank takes part in, in a step.

    Attributes:
        name: which group does what.
        tensor_bytes: of the tensors that are reduced, gathered or passed on, each counted whole.
        sent_bytes: that leave the rank.
        seconds: all of them, one after the other, nothing overlapped.
    """

    name: str
    tensor_bytes: float
    sent_bytes: float
    seconds: float


def messages(workload: Workload, layout: Layout, stage: Stage, hardware: Hardware) -> list[Message]:
    """Those of a rank of this stage, for all micro-batches."""
    return [
        message
        for message in (
            *_tensor_messages(layout, stage, hardware),
            _pipeline_message(layout, stage, hardware),
            *_data_messages(workload, layout, stage, hardware),
        )
        if message.tensor_bytes > 0
    ]


def _tensor_messages(layout: Layout, stage: Stage, hardware: Hardware) -> list[Message]:
    """Megatron's, as the trace of the layers has counted them; the group's ranks are neighbours in a node."""
    ranks, times, load = layout.sharing.tensor, layout.micro_batches, stage.load
    reduced, gathered = load.reduced_bytes, load.gathered_bytes
    calls = load.collectives * reduced / (reduced + gathered) if reduced + gathered else 0.0
    link = hardware.intra_node
    return [
        _ring("tensor all-reduce", reduced * times, calls * times, 2, ranks, link, hardware),
        _ring(
            "tensor gather and scatter",
            gathered * times,
            (load.collectives - calls) * times,
            1,
            ranks,
            link,
            hardware,
        ),
    ]


def _pipeline_message(layout: Layout, stage: Stage, hardware: Hardware) -> Message:
    """The streams to the next stage, and their gradients to the one before; every tensor rank sends its own."""
    link = hardware.intra_node if layout.gpus <= hardware.gpus_per_node else hardware.inter_node
    each = stage.sent_bytes + stage.received_bytes
    size_bytes = layout.micro_batches * each
    transfers = layout.micro_batches * ((stage.sent_bytes > 0) + (stage.received_bytes > 0))
    seconds = size_bytes / (link.bytes_per_s * hardware.link_fraction) + transfers * link.latency_s
    return Message("pipeline stage to stage", size_bytes, size_bytes, seconds)


def _data_messages(workload: Workload, layout: Layout, stage: Stage, hardware: Hardware) -> list[Message]:
    """DeepSpeed's, none overlapped with work (`overlap_comm: false`), gradients in fp32.

    ZeRO-0 and 1 reduce once a step. ZeRO-2 reduces every micro-batch, and by all-reduce: its buckets span
    several ranks' shares. ZeRO-3 reduces and scatters every micro-batch, and gathers the weights for its forward
    and for its backward pass.
    """
    elements, each_bytes = sum(stage.parameters), workload.dtype.itemsize
    ranks, passes = layout.data, layout.micro_batches
    link = data_link(layout, hardware)
    gradients, weights = FP32 * elements, each_bytes * elements
    buckets = ceil(elements / BUCKET)
    if layout.zero_stage == 3:
        calls = sum(n > PERSISTENT for n in stage.parameters)
        return [
            _ring("data reduce-scatter", passes * gradients, passes * buckets, 1, ranks, link, hardware),
            _ring("data all-gather", 2 * passes * weights, 2 * passes * calls, 1, ranks, link, hardware),
        ]
    times = passes if layout.zero_stage == 2 else 1
    reduced = _ring("data all-reduce", times * gradients, times * buckets, 2, ranks, link, hardware)
    if layout.zero_stage == 0:
        return [reduced]
    return [reduced, _ring("data all-gather", weights, 1, 1, ranks, link, hardware)]


def data_link(layout: Layout, hardware: Hardware) -> Link:
    """What a data-parallel ring has: its ranks in a node share that node's adapters among themselves."""
    tensor, node = layout.sharing.tensor, hardware.gpus_per_node
    if layout.data * tensor <= node:
        return hardware.intra_node
    adapters = max(1, node // tensor)
    rate = min(hardware.intra_node.bytes_per_s, adapters * hardware.inter_node.bytes_per_s)
    return Link(rate, hardware.inter_node.latency_s)


def _ring(
    name: str, size_bytes: float, calls: float, rounds: int, ranks: int, link: Link, hardware: Hardware
) -> Message:
    """A ring moves (n - 1)/n of the tensor a round; an all-reduce takes two. Small ones go down a tree."""
    if ranks == 1:
        return Message(name, 0.0, 0.0, 0.0)
    sent = rounds * (ranks - 1) / ranks * size_bytes
    latency_s = calls * rounds * ceil(log2(ranks)) * link.latency_s
    return Message(name, size_bytes, sent, sent / (link.bytes_per_s * hardware.link_fraction) + latency_s)
