"""Small workloads and round hardware."""

from dataclasses import replace
from functools import cache

from pgm_scale.config import PartitionTransformerConfig
from pgm_scale.planning.cluster import Hardware, Link
from pgm_scale.planning.layouts import Layout, Sharing, Workload
from pgm_scale.planning.search import Planner

HARDWARE = Hardware(
    name="round",
    gpus_per_node=4,
    memory_bytes=80e9,
    reserved_bytes=5e9,
    peak_flops=1e15,
    peak_fp32_flops=5e13,
    matmul_fraction=0.5,
    attention_fraction=0.25,
    memory_bytes_per_s=2e12,
    memory_fraction=0.5,
    host_s_per_kernel=1e-9,
    intra_node=Link(100e9, 1e-6),
    inter_node=Link(10e9, 1e-5),
    link_fraction=0.5,
)
MODEL = PartitionTransformerConfig(
    hidden_size=64, num_heads=4, num_encoder_blocks=3, num_decoder_blocks=2, condition_size=8, dropout=0.1
)
WORKLOAD = Workload(
    MODEL,
    vocab_size=101,
    length=32,
    rows_per_sequence=1,
    global_batch_sequences=16,
    precision="bf16",
    has_ema=True,
)


@cache
def planner_of(workload: Workload) -> Planner:
    """One for all tests, because tracing units takes a second or so."""
    return Planner(workload, HARDWARE)


def layout(**changes) -> Layout:
    """One GPU, ZeRO-1, 16 micro-batches of one sequence, but for `changes`."""
    tensor, sequence_parallel = changes.pop("tensor", 1), changes.pop("sequence_parallel", False)
    plain = Layout(Sharing(tensor, sequence_parallel), 1, 1, 1, 1, 16, False)
    return replace(plain, **changes)
