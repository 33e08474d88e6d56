"""A planner's answer as tables, as YAML to paste and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pgm_scale.planning.cluster import Hardware
from pgm_scale.planning.dry_build import DryBuild, parallel_config
from pgm_scale.planning.layouts import Layout, Workload
from pgm_scale.planning.search import Plan, Planner

GB = 1e9
_WIDTH = 118  # where the output is not a terminal


def print_plans(plans: Sequence[Plan], built: Sequence[DryBuild], planner: Planner, gpus: int) -> None:
    """The tables, then the best plan's YAML."""
    workload, hardware = planner.workload, planner.hardware
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(_summary(workload, built[0].parameters, gpus, hardware))
    for table in (_layout_table(plans, hardware), _memory_table(plans), _traffic_table(plans)):
        console.print()
        console.print(table)
    console.print()
    for line in assumptions(planner):
        console.print(line, soft_wrap=True)
    console.print(_proof(built))
    for number, plan in enumerate(plans[1:], 2):
        console.print(f"{number}: {' '.join(overrides(plan))}", soft_wrap=True)
    console.print("\n# 1, to paste into the configuration:")
    console.print(to_yaml(plans[0]), end="", markup=False)


def to_yaml(plan: Plan) -> str:
    return yaml.safe_dump(settings(plan), sort_keys=False, default_flow_style=None, width=_WIDTH)


def settings(plan: Plan) -> dict[str, dict[str, Any]]:
    """The keys of a run's configuration that make it this layout."""
    parallel = parallel_config(plan.layout, plan.stage_units)
    chosen = ("tensor", "pipeline", "sequence_parallel", "zero_stage", "stage_units")
    values = {key: getattr(parallel, key) for key in chosen}
    return {
        "parallel": values | {"stage_units": list(parallel.stage_units)},
        "training": {
            "micro_batch_sequences": plan.layout.micro_batch_sequences,
            "recompute_blocks": plan.layout.recompute,
        },
    }


def overrides(plan: Plan) -> list[str]:
    """The same as arguments of the command line."""
    return [
        f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]}".replace(
            " ", ""
        )
        for section, keys in settings(plan).items()
        for key, value in keys.items()
    ]


def to_json(plans: Sequence[Plan], built: Sequence[DryBuild], planner: Planner, gpus: int) -> dict[str, Any]:
    workload, hardware = planner.workload, planner.hardware
    return {
        "workload": asdict(workload),
        "gpus": gpus,
        "hardware": asdict(hardware),
        "parameters": built[0].parameters,
        "assumptions": assumptions(planner),
        "slowdown": planner.slowdown,
        "plans": [
            asdict(plan)
            | {
                "memory_total_bytes": plan.memory.total,
                "free_bytes": plan.free_bytes(hardware),
                "step_s": plan.time.total_s,
                "dry_build": asdict(proof),
                "settings": settings(plan),
            }
            for plan, proof in zip(plans, built, strict=True)
        ],
    }


def assumptions(planner: Planner) -> list[str]:
    """What the predictions rest on, in words."""
    workload, hardware = planner.workload, planner.hardware
    peak, links = hardware.peak(workload.precision), (hardware.intra_node, hardware.inter_node)
    rates = " and ".join(f"{link.bytes_per_s / GB:.0f}" for link in links)
    return [
        f"Assumed: matrix products at {hardware.matmul_fraction:.0%} and attention at "
        f"{hardware.attention_fraction:.0%} of {peak / 1e12:.0f} TFLOP/s, other kernels at "
        f"{hardware.memory_fraction:.0%} of {hardware.memory_bytes_per_s / 1e12:.2f} TB/s, links at "
        f"{hardware.link_fraction:.0%} of {rates} GB/s a GPU in and between nodes, "
        f"{hardware.host_s_per_kernel * 1e6:.0f} us to launch a kernel, "
        f"{hardware.reserved_bytes / GB:.0f} GB of a GPU left free.",
        "Kernels, bytes and kept tensors are those of the model's own code, one kernel after the other; "
        "communication does not overlap with work; groups are of expected size; data is always there.",
        *_calibration(planner.slowdown),
    ]


def _calibration(slowdown: Mapping[str, float]) -> list[str]:
    if not slowdown:
        return []
    factors = ", ".join(f"{kind} {factor:.2f}" for kind, factor in slowdown.items())
    return [f"Times of units are scaled to those measured on this machine's GPU: {factors} x the assumed."]


def layout_name(layout: Layout) -> str:
    sharing = layout.sharing
    tensor = f"TP{sharing.tensor}{'+SP' if sharing.sequence_parallel else ''}"
    return f"{tensor} PP{layout.pipeline} DP{layout.data} ZeRO-{layout.zero_stage}"


def _summary(workload: Workload, parameters: int, gpus: int, hardware: Hardware) -> str:
    return (
        f"{parameters:,} parameters, {workload.global_batch_sequences} sequences of {workload.length} tokens a "
        f"step, {workload.precision}, on {gpus} x {hardware.name} ({hardware.gpus_per_node} a node)"
    )


def _layout_table(plans: Sequence[Plan], hardware: Hardware) -> Table:
    headers = "", "layout", "micro-batches", "recompute", "GB a GPU", "s a step", "tokens/s", "MFU", "bubble"
    table = _table("Layouts that fit, fastest first", (*headers, "slowest stage"))
    for number, plan in enumerate(plans, 1):
        layout, time = plan.layout, plan.time
        table.add_row(
            str(number),
            layout_name(layout),
            f"{layout.micro_batches} x {layout.micro_batch_sequences}",
            "blocks" if layout.recompute else "-",
            f"{plan.memory.total / GB:.1f} of {hardware.usable_bytes / GB:.0f}",
            f"{time.total_s:.3f}",
            f"{plan.tokens_per_s:,.0f}",
            f"{plan.mfu:.1%}",
            f"{time.bubble:.1%}" if layout.pipeline > 1 else "-",
            f"{time.imbalance:.3f} x mean" if layout.pipeline > 1 else "-",
        )
    return table


def _memory_table(plans: Sequence[Plan]) -> Table:
    parts = tuple(asdict(plans[0].memory))
    table = _table("Memory of the fullest rank at its peak, GB", ("", "stage", *parts, "total"))
    for number, plan in enumerate(plans, 1):
        values = [f"{value / GB:.2f}" for value in asdict(plan.memory).values()]
        table.add_row(str(number), str(plan.fullest_stage), *values, f"{plan.memory.total / GB:.2f}")
    return table


def _traffic_table(plans: Sequence[Plan]) -> Table:
    names = list(dict.fromkeys(message.name for plan in plans for message in plan.traffic))
    table = _table("Sent by that rank in a step, GB (seconds)", ("", *names, "update"))
    for number, plan in enumerate(plans, 1):
        found = {m.name: f"{m.sent_bytes / GB:.2f} ({m.seconds:.3f})" for m in plan.traffic}
        cells = [found.get(name, "-") for name in names]
        table.add_row(str(number), *cells, f"({plan.time.update_s:.3f})")
    return table


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for header in headers:
        table.add_column(header, justify="left" if header in ("", "layout") else "right")
    return table


def _proof(built: Sequence[DryBuild]) -> str:
    parts = sum(proof.parts for proof in built)
    error = max(proof.largest_memory_error for proof in built)
    return (
        f"Built without memory: {parts} parts of {len(built)} layouts hold every parameter once and run in turn; "
        f"their traced activations are at most {error:.1%} of a rank's memory off the predicted ones."
    )
