"""The layouts of `make parity`, what each is compared with, and how close it has to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from ops.parity_runs import LEARNING_RATE, STEPS, Case
from pgm_scale.config import ParallelConfig

MOST_RANKS = 8

Zero = Literal[0, 1, 2, 3]
MODELS = ("PGM", "MDLM")
TENSOR, PIPELINE, DATA = (1, 2, 4), (1, 2, 3), (1, 2)
STAGES: tuple[Zero, ...] = (0, 1, 2, 3)
# By hand, so that the table is the same on every machine: a PGM's cuts pass both streams (in two), the encoder's
# and the decoder's alone (in three).
STAGE_UNITS = {"PGM": {1: (), 2: (4, 3), 3: (2, 4, 1)}, "MDLM": {1: (), 2: (3, 3), 3: (2, 2, 2)}}

Bounds = dict[str, float]
FP32_BOUNDS: Bounds = {
    **dict.fromkeys(
        ("loss", "gradient_norm", "validation_nll", "weight", "exp_avg", "exp_avg_sq", "ema"), 1e-5
    ),
    # Rounding of small gradients; a sum that is forgotten or made twice is 0.5 and more.
    "exp_avg_relative": 1e-4,
}
# Values of bf16 are rounded to 2^-9 of themselves. How far that takes a run is measured, by one process in bf16
# against fp32; the bounds are a few times as much, and less than what a sum makes that is forgotten or made twice.
# Adam moves a weight whose gradient is mostly rounding by up to the learning rate a step, whichever the sign; one
# such sign in the first update changes the small gradients within all blocks for good. So their relative difference
# has no bound here: 0.1 to 0.8 was seen on one process, whole batch or micro-batches.
BF16_BOUNDS: Bounds = {
    "loss": 2**-10,
    "gradient_norm": 2**-7,
    "validation_nll": 2**-10,
    "weight": 2 * STEPS * LEARNING_RATE,
    "weight_rms": LEARNING_RATE / 2,
    "ema": 2 * STEPS * LEARNING_RATE,
    "exp_avg": 2**-10,
    "exp_avg_sq": 1e-5,
}


def layout(
    model: str, tensor: int = 1, pipeline: int = 1, data: int = 1, zero: Zero = 1, **options: Any
) -> Case:
    """A case with the model's cuts for its pipeline; `options` are fields of the case or its `ParallelConfig`."""
    of_case = {f.name for f in dataclasses.fields(Case)}
    parallel = {
        "tensor": tensor,
        "pipeline": pipeline,
        "zero_stage": zero,
        "stage_units": STAGE_UNITS["PGM" if "PGM" in model else "MDLM"][pipeline],
        **{name: value for name, value in options.items() if name not in of_case},
    }
    rest = {name: value for name, value in options.items() if name in of_case}
    return Case(model, ParallelConfig(**parallel), data, **rest)


def fp32_reference(case: Case) -> Case:
    """The same workload on one process, the whole batch in one forward pass."""
    return layout(case.workload, zero=0, micro_batch_sequences=16)


def reference(case: Case) -> Case:
    """`fp32_reference` in the case's precision.

    In bf16, ZeRO-0 computes with fp32 weights under autocast and the other stages with bf16 weights: each has its
    own reference.
    """
    if case.precision == "fp32":
        return fp32_reference(case)
    zero: Zero = 1 if case.parallel.zero_stage else 0
    return layout(case.workload, zero=zero, precision="bf16", micro_batch_sequences=16)


@dataclass(frozen=True)
class Section:
    """Cases that are reported together, and how close each has to be to the case it is compared with."""

    title: str
    cases: Sequence[Case]
    bounds: Bounds = field(default_factory=lambda: FP32_BOUNDS)
    against: Callable[[Case], Case] = reference


def both(*shapes: tuple[int, ...], models: Iterable[str] = MODELS, **options: Any) -> list[Case]:
    """The shapes (TP, PP, DP, ZeRO stage) for each model."""
    return [layout(model, *shape, **options) for model in models for shape in shapes]  # type: ignore[arg-type]


GRID = Section(
    "TP x PP x DP x ZeRO, as above",
    [layout(*place) for place in product(MODELS, TENSOR, PIPELINE, DATA, STAGES)],
)
BF16_SHAPES = (
    (1, 1, 1, 0),
    (1, 1, 2, 0),
    (2, 1, 1, 0),
    (1, 1),
    (1, 1, 2, 2),
    (2, 1, 2, 3),
    (4,),
    (1, 3),
    (2, 2),
)
BF16 = Section(
    "bf16, against one process in bf16",
    both(*BF16_SHAPES, (1, 2, 2), precision="bf16")
    + both((4,), (2, 2), precision="bf16", sequence_parallel=True)
    + both((1, 2, 2), precision="bf16", offload_optimizer=True)
    + both(
        (1, 1, 1, 0), (2, 1, 1, 0), (1, 2), (2, 1, 2, 3), models=["image PGM", "MaskGIT"], precision="bf16"
    ),
    BF16_BOUNDS,
)
BF16_ITSELF = Section(
    "one process in bf16, against fp32",
    [layout(m, zero=z, precision="bf16", micro_batch_sequences=16) for m in MODELS for z in (0, 1)],
    {},
    fp32_reference,
)
FP32_SECTIONS = (
    GRID,
    Section(
        "sequence_parallel",
        both((2,), (4,), (2, 1, 2, 3), (2, 2), (2, 3), (4, 2), (2, 2, 2), sequence_parallel=True)
        + both((2, 2), models=["PGM"], sequence_parallel=True, stage_units=(1, 6))  # the embedding alone
        + both((2, 2), models=["MDLM"], sequence_parallel=True, stage_units=(1, 5)),
    ),
    Section(
        "recompute_blocks",
        both((1,), (1, 1, 2, 3), (1, 3), recompute_blocks=True)
        + both((2, 2), recompute_blocks=True, sequence_parallel=True),
    ),
    Section(
        "offload_optimizer", both((1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 3), (2, 2), offload_optimizer=True)
    ),
    Section("stages by measured cost", both((1, 2), (1, 3), stage_units=())),
    Section("every cut of a PGM in two", [layout("PGM", 1, 2, stage_units=(n, 7 - n)) for n in range(1, 7)]),
    Section(
        "PGM, GroupSwap learn+freqs+mean and mlp4",
        both((4,), (1, 3), (2, 2), (2, 1, 2, 3), models=["PGM mlp4 mean"])
        + both((4,), (2, 2), models=["PGM mlp4 mean"], sequence_parallel=True),
    ),
    Section(
        "AR",
        both((4,), (1, 3), (2, 2), (2, 1, 2, 3), models=["AR"])
        + both((2,), (2, 2), models=["AR"], sequence_parallel=True),
    ),
    Section(
        "PGM of images, with classes and registers",
        both((2,), (4,), (1, 1, 2, 0), (1, 1, 2, 2), (1, 1, 2, 3), (2, 1, 2, 3), (1, 2), models=["image PGM"])
        + both((1, 3), (2, 2), (1, 2, 2), (2, 3), (4, 2), models=["image PGM"])
        + both((2,), (4,), (2, 1, 2, 3), (2, 2), models=["image PGM"], sequence_parallel=True)
        + both((2, 2), models=["image PGM"], sequence_parallel=True, stage_units=(1, 6))
        + both((1,), (1, 1, 2, 3), (2, 3), models=["image PGM"], recompute_blocks=True)
        + both((1, 1, 2, 1), (2, 2), models=["image PGM"], offload_optimizer=True)
        + both((1, 2), models=["image PGM"], stage_units=()),
    ),
    Section(
        "MaskGIT, whose output linear is the token table",
        both((2,), (4,), (1, 1, 2, 0), (1, 1, 2, 2), (1, 1, 2, 3), (2, 1, 2, 3), (1, 2), models=["MaskGIT"])
        + both((1, 3), (2, 2), (1, 2, 2), (2, 3), (4, 2), models=["MaskGIT"])
        + both((4,), (2, 2), models=["MaskGIT"], sequence_parallel=True)
        + both((1,), (1, 1, 2, 3), (2, 3), models=["MaskGIT"], recompute_blocks=True)
        + both((1, 1, 2, 1), (2, 2), models=["MaskGIT"], offload_optimizer=True)
        + both((1, 2), models=["MaskGIT"], stage_units=()),
    ),
    Section("D3PM, time-conditioned", both((4,), (1, 3), (2, 2), (2, 1, 2, 3), models=["D3PM"])),
)
