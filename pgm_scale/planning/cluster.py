"""The hardware to plan for: a YAML file whose `hardware` section is read here, all assumptions included."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pgm_scale.config import parse, read_yaml
from pgm_scale.errors import UserError


@dataclass(frozen=True)
class Link:
    """What one GPU sends in one direction while it receives as much, and what a message costs before that."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU, in nodes of one kind. Rates are those of the data sheet; the fractions are assumptions.

    Attributes:
        memory_bytes: of one GPU, as `torch.cuda.get_device_properties` reports it.
        reserved_bytes: what plans leave free: CUDA context, NCCL's buffers, fragmentation.
        peak_flops, peak_fp32_flops: dense bf16 and plain fp32 FLOP/s, multiply and add counted.
        matmul_fraction: of the peak, that large matrix products reach.
        attention_fraction: of the peak, that fused attention reaches on the attended pairs.
        memory_bytes_per_s: of the GPU's own memory.
        memory_fraction: of it, that element-wise kernels and reductions reach.
        host_s_per_kernel: what Python and torch take to launch a kernel; small kernels wait for it.
        intra_node: between GPUs of a node, for each GPU.
        inter_node: between nodes, for each GPU (its share of the node's adapters).
        link_fraction: of a link's rate, that large collectives reach.
    """

    name: str
    gpus_per_node: int
    memory_bytes: float
    reserved_bytes: float
    peak_flops: float
    peak_fp32_flops: float
    matmul_fraction: float
    attention_fraction: float
    memory_bytes_per_s: float
    memory_fraction: float
    host_s_per_kernel: float
    intra_node: Link
    inter_node: Link
    link_fraction: float

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes - self.reserved_bytes

    def peak(self, precision: str) -> float:
        return self.peak_flops if precision == "bf16" else self.peak_fp32_flops


def load_hardware(path: str | Path) -> Hardware:
    """The `hardware` section of a cluster file; other sections are another reader's.

    Raises:
        UserError: one line for each problem.
    """
    problems: list[str] = []
    hardware = parse(Hardware, read_yaml(path).get("hardware", {}), problems, "hardware")
    if hardware is not None:
        problems += _ranges(hardware)
    if hardware is None or problems:
        raise UserError(
            f"{path}: {len(problems)} problem(s) in the cluster file:\n  " + "\n  ".join(problems)
        )
    return hardware


def _ranges(part: Any, where: str = "hardware") -> list[str]:
    """Numbers that must be positive, and fractions of at most 1."""
    problems = []
    for field in fields(part):
        value, name = getattr(part, field.name), f"{where}.{field.name}"
        if isinstance(value, Link):
            problems += _ranges(value, name)
        elif isinstance(value, str):
            continue
        elif field.name.endswith("_fraction") and not 0 < value <= 1:
            problems.append(f"{name}: {value} must be above 0 and at most 1")
        elif not value > 0:
            problems.append(f"{name}: {value} must be above 0")
    return problems
