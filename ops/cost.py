"""What runs cost by `plan`'s prediction: time and GPU-hours of the examples, and of model sizes on numbers of GPUs.

python -m ops.cost    # about 4 minutes on a CPU; writes ops/bench/costs.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ops.slurm_examples import PUBLISHED, ROOT, SCALE, Example
from pgm_scale import config as configuration
from pgm_scale.config import MODEL_SIZES, PartitionTransformerConfig, RunConfig
from pgm_scale.files import atomic_write_bytes
from pgm_scale.planning.cluster import Hardware, load_hardware
from pgm_scale.planning.layouts import Layout, Workload
from pgm_scale.planning.report import GB, assumptions, layout_name
from pgm_scale.planning.search import Plan, Planner, ranked

CLUSTER = "h100-8x"
SIZES = ("pgm-0.2b", "pgm-1.3b", "pgm-7b", "pgm-13b", "pgm-30b", "pgm-70b")
GPUS = (8, 64, 128, 512, 1024)
VOCAB, LENGTH, BATCH = 50_258, 1024, 2048
TOKENS = 100e9
TOKENS_PER_PARAMETER = 20  # where a language model's loss falls fastest for its FLOPs; not tried for PGM
SPARE = 0.1  # of the memory that plans may use: predictions are a few percent off
DAY_S = 86_400.0
# Vocabulary and length of the data of the published runs (FACTS 1 and 2.1); ours is BATCH's.
DATA = {"lm1b": (30_522, 128), "imagenet": (16_386, 1025)}
# What the paper's own runs took, in days (FACTS 6.1, which does not name their GPUs).
PAPER_DAYS = {"lm1b-pgm-6-6": 0.92, "owt-pgm-8-8": 4.5, "imagenet-pgm-12-12": 3.8}


def run_rows(examples: Sequence[Example], cluster: str | None = None) -> Iterator[str]:
    """A line for each example in the layout of its configuration, on its own cluster or on another.

    Raises:
        UserError: a configuration or a cluster file is wrong.
    """
    for example in examples:
        config = configuration.load(ROOT / example.config, example.overrides)
        planner = run_planner(example, config, hardware_of(cluster or example.cluster))
        gpus = example.nodes * hardware_of(example.cluster).gpus_per_node
        plan = planner.predict(Layout.of(config, gpus))
        days = config.training.steps * plan.time.total_s / DAY_S
        paper = PAPER_DAYS.get(example.name) if cluster is None else None
        yield _row(
            example.config.removeprefix("configs/"),
            f"{gpus} x {planner.hardware.name}",
            *_layout_cells(plan, planner.hardware),
            f"{config.training.steps:,}",
            _days(days),
            f"{24 * days * gpus:,.0f}",
            "" if paper is None else _days(paper),
        )


def run_planner(example: Example, config: RunConfig, hardware: Hardware) -> Planner:
    """Predicts an example with the vocabulary and length of its data."""
    vocab, length = next((d for name, d in DATA.items() if name in example.config), (VOCAB, LENGTH))
    return Planner(Workload.of(config, vocab, length), hardware)


def size_rows(planners: dict[str, Planner]) -> Iterator[str]:
    """A line for each size and number of GPUs: the fastest layout that leaves `SPARE` of the memory."""
    for size, planner in planners.items():
        tokens = TOKENS_PER_PARAMETER * parameters(planner)
        for gpus in GPUS:
            plan = roomy(ranked(planner.all_plans(gpus), planner.hardware), planner.hardware)
            if plan is None:
                continue
            cells = []
            for amount in (TOKENS, tokens):
                days = amount / plan.tokens_per_s / DAY_S
                cells += [_days(days), f"{24 * days * gpus:,.0f}"]
            yield _row(
                size, gpus, *_layout_cells(plan, planner.hardware), *cells[:2], _amount(tokens), *cells[2:]
            )


def roomy(plans: Sequence[Plan], hardware: Hardware) -> Plan | None:
    """The first, which is the fastest, that leaves `SPARE` of the memory."""
    return next((plan for plan in plans if plan.free_bytes(hardware) >= SPARE * hardware.usable_bytes), None)


def parameters(planner: Planner) -> int:
    """Of the model, counted on tensors without memory."""
    import torch

    from pgm_scale.models import build_model

    workload = planner.workload
    with torch.device("meta"):
        model = build_model(workload.model, workload.vocab_size, workload.length)
    return sum(parameter.numel() for parameter in model.parameters())


def hardware_of(cluster: str) -> Hardware:
    return load_hardware(ROOT / "configs/clusters" / f"{cluster}.yaml")


def size_planners(hardware: Hardware) -> dict[str, Planner]:
    """One for each size, without dropout, as models that see their data once are trained."""
    return {
        size: Planner(Workload(_model(size), VOCAB, LENGTH, 1, BATCH, "bf16", has_ema=True), hardware)
        for size in SIZES
    }


def _model(size: str) -> PartitionTransformerConfig:
    if size in MODEL_SIZES:
        shape = {key: value for key, value in MODEL_SIZES[size].items() if key != "kind"}
        return PartitionTransformerConfig(**shape, dropout=0.0)
    model = configuration.load(ROOT / f"configs/scale/{size}.yaml").model
    assert isinstance(model, PartitionTransformerConfig)
    return model


def _layout_cells(plan: Plan, hardware: Hardware) -> tuple[str, ...]:
    layout = plan.layout
    passes = f"{layout.micro_batches} x {layout.micro_batch_sequences}"
    return (
        f"{layout_name(layout)}, {passes}{', recompute' if layout.recompute else ''}",
        f"{plan.memory.total / GB:.0f} of {hardware.usable_bytes / GB:.0f}",
        f"{plan.time.total_s:.3f}",
        f"{plan.tokens_per_s:,.0f}",
    )


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(header: Sequence[str], rows: Sequence[str]) -> list[str]:
    return [_row(*header), "|" + "---|" * len(header), *rows]


def _days(days: float) -> str:
    """Two digits at least."""
    return f"{days:,.0f}" if days >= 10 else f"{days:.{1 if days >= 1 else 2 if days >= 0.1 else 4}f}"


def _amount(tokens: float) -> str:
    return f"{tokens / 1e9:,.0f}B" if tokens < 1e12 else f"{tokens / 1e12:.2f}T"


def page() -> str:
    hardware = hardware_of(CLUSTER)
    planners = size_planners(hardware)
    layout = ("layout, micro-batches", "GB a GPU", "s a step", "tokens/s")
    run_header = ("configuration", "GPUs", *layout, "steps", "days", "GPU-hours", "the paper's days")
    size_header = (
        *("model", "GPUs", *layout, "100B: days", "100B: GPU-hours"),
        *(f"{TOKENS_PER_PARAMETER} a parameter", "days", "GPU-hours"),
    )
    runs = [*run_rows(PUBLISHED), *run_rows(PUBLISHED, CLUSTER), *run_rows(SCALE)]
    return "\n".join(
        [
            "# Time and cost, predicted",
            "",
            "`python -m ops.cost`. **Predictions of `pgm-scale plan`, none of them measured**: multiply GPU-hours "
            "by your price. Not in them: validation, sampling, restarts, a slow file system, nodes that break.",
            "",
            *assumptions(next(iter(planners.values()))),
            "",
            "## Runs as configured",
            "",
            "The published ones on as many GPUs as published (FACTS 2.2, 5, 6.1), and configs/scale.",
            "",
            *_table(run_header, runs),
            "",
            f"## Sizes on numbers of {hardware.name}",
            "",
            f"{BATCH} sequences of {LENGTH} tokens a step, {VOCAB:,} tokens, bf16, EMA, no dropout: the fastest "
            f"layout that leaves {SPARE:.0%} of the memory. Not listed: numbers of GPUs on which no layout does.",
            "",
            *_table(size_header, list(size_rows(planners))),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ops.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default=str(ROOT / "ops/bench/costs.md"), help="(default %(default)s)")
    options = parser.parse_args()
    text = page()
    atomic_write_bytes(Path(options.output), text.encode())
    print(text)


if __name__ == "__main__":
    main()
