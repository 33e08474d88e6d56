"""Plan every published size on every size of cluster, build the best layouts, and write the table of them.

python ops/plan_check.py    # minutes on a CPU; exit code 1 if a layout cannot be built
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from pgm_scale.config import MODEL_SIZES, PartitionTransformerConfig
from pgm_scale.files import atomic_write_bytes
from pgm_scale.planning.cluster import load_hardware
from pgm_scale.planning.dry_build import dry_build
from pgm_scale.planning.layouts import Workload
from pgm_scale.planning.report import GB, assumptions, layout_name
from pgm_scale.planning.search import Plan, Planner, ranked

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("pgm-0.2b", "pgm-1.3b", "pgm-7b", "pgm-30b", "pgm-70b")
GPUS = (8, 64, 512, 1024)
VOCAB, LENGTH, BATCH = 50_258, 1024, 2048
BUILT = 3  # layouts of each case
HEADER = (
    "| model | GPUs | layout | micro-batches | recompute | GB a GPU | s a step | tokens/s | MFU | built |"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default=str(ROOT / "configs/clusters/h100-8x.yaml"))
    parser.add_argument("--output", default=str(ROOT / "ops/bench/plans.md"))
    options = parser.parse_args()
    hardware = load_hardware(options.cluster)
    lines: list[str] = []
    problems: list[str] = []
    for size in SIZES:
        shape = {key: value for key, value in MODEL_SIZES[size].items() if key != "kind"}
        model = PartitionTransformerConfig(**shape)
        planner = Planner(Workload(model, VOCAB, LENGTH, 1, BATCH, "bf16", has_ema=True), hardware)
        for gpus in GPUS:
            for line in _rows(size, planner, gpus, problems):
                print(line, flush=True)
                lines.append(line)
    text = _page(lines, planner)
    atomic_write_bytes(Path(options.output), text.encode())
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


def _rows(size: str, planner: Planner, gpus: int, problems: list[str]) -> Iterator[str]:
    """A line for the best layout, after it and the next ones are built; or what is missing."""
    plans = planner.all_plans(gpus)
    best = ranked(plans, planner.hardware)[:BUILT]
    if not best:
        smallest = min(plans, key=lambda plan: plan.memory.total)
        missing = -smallest.free_bytes(planner.hardware) / GB
        yield (
            f"| {size} | {gpus} | nothing fits: {missing:.1f} GB a GPU missing, {layout_name(smallest.layout)} |"
            + (" |" * 7)
        )
        return
    built = [_build(planner, plan, problems) for plan in best]
    yield _row(size, gpus, best[0], sum(built))


def _build(planner: Planner, plan: Plan, problems: list[str]) -> int:
    """The parts of a layout that were built."""
    proof = dry_build(planner.workload, plan.layout, planner.stages(plan.layout), planner.hardware)
    problems += [f"{layout_name(plan.layout)}: {problem}" for problem in proof.problems]
    return proof.parts


def _row(size: str, gpus: int, plan: Plan, parts: int) -> str:
    layout = plan.layout
    cells = (
        size,
        gpus,
        layout_name(layout),
        f"{layout.micro_batches} x {layout.micro_batch_sequences}",
        "blocks" if layout.recompute else "",
        f"{plan.memory.total / GB:.1f}",
        f"{plan.time.total_s:.2f}",
        f"{plan.tokens_per_s:,.0f}",
        f"{plan.mfu:.1%}",
        f"{parts} parts",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _page(lines: list[str], planner: Planner) -> str:
    hardware = planner.hardware
    separator = "|" + "---|" * (HEADER.count("|") - 1)
    return "\n".join(
        [
            "# Planned layouts",
            "",
            f"`python ops/plan_check.py`: the fastest layout that fits, of all that `pgm-scale plan` compares, for "
            f"{BATCH} sequences of {LENGTH} tokens a step and {VOCAB:,} tokens, bf16 with EMA, on {hardware.name} "
            f"({hardware.gpus_per_node} a node). Predictions, not measurements. The {BUILT} best layouts of each "
            "case are built: every distinct part of the model on meta tensors behind a fake process group of that "
            "many ranks, every parameter counted once, a micro-batch run through all stages.",
            "",
            *assumptions(planner),
            "",
            HEADER,
            separator,
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
