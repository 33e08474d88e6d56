"""`pgm-scale plan`: read what is asked, search, prove the best layouts, report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pgm_scale import config as configuration
from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, check_writable, finite
from pgm_scale.parallel.layout import layout_problems
from pgm_scale.parallel.unit_costs import measure_unit_costs
from pgm_scale.planning.cluster import load_hardware
from pgm_scale.planning.dry_build import DryBuild, dry_build, parallel_config
from pgm_scale.planning.layouts import Workload
from pgm_scale.planning.report import GB, layout_name, print_plans, to_json
from pgm_scale.planning.search import Plan, Planner, ranked
from pgm_scale.training.teacher_model import fill_in_model

MEASURED_SEQUENCES = 4


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asks for; None is the configuration's, the data's or the cluster's own value."""

    config_path: str
    overrides: Sequence[str]
    cluster_path: str
    gpus: int | None
    length: int | None
    vocab_size: int | None
    top: int
    json_path: str | None
    measures: bool = False


def plan(request: PlanRequest) -> None:
    """Print the best layouts, and write them as JSON if asked.

    Raises:
        UserError: bad input, or nothing fits; then it says what would help.
    """
    if request.json_path:
        check_writable("--json", Path(request.json_path))
    config = configuration.load(request.config_path, request.overrides, complete=fill_in_model)
    if not Path(request.cluster_path).is_file():  # the default is one of the source tree
        raise UserError(
            f"no cluster file {request.cluster_path} here; give --cluster FILE.yaml, "
            "such as one of configs/clusters in the source tree"
        )
    hardware = load_hardware(request.cluster_path)
    gpus = request.gpus or hardware.gpus_per_node
    if gpus > hardware.gpus_per_node and gpus % hardware.gpus_per_node:
        raise UserError(
            f"--gpus {gpus}: give whole nodes of {hardware.gpus_per_node} GPUs, or fewer GPUs than one"
        )
    planner = Planner(_workload(config, request), hardware)
    if request.measures:
        _measure(planner)
    plans = planner.all_plans(gpus)
    if not plans:
        raise UserError(
            f"training.global_batch_sequences {config.training.global_batch_sequences} cannot be divided over "
            f"{gpus} GPUs by any layout; change one of them"
        )
    fitting = ranked(plans, hardware)
    if not fitting:
        raise UserError(_nothing_fits(planner, plans, gpus))
    proved = _proved(planner, config, fitting, gpus, request.top)
    chosen, built = [plan for plan, _ in proved], [proof for _, proof in proved]
    print_plans(chosen, built, planner, gpus)
    if request.json_path:
        content = to_json(chosen, built, planner, gpus)
        atomic_write_bytes(Path(request.json_path), (json.dumps(finite(content), indent=2) + "\n").encode())


def _workload(config: RunConfig, request: PlanRequest) -> Workload:
    """With the vocabulary and the length that are given, else those of the data."""
    vocab_size, length = request.vocab_size, request.length
    if vocab_size is None or length is None:
        try:
            manifest = SplitStorage(config.data.train, config.data.cache_folder).manifest
        except UserError as error:
            raise UserError(f"{error}; or give --length and --vocab-size") from None
        vocab_size = vocab_size or manifest.vocabulary.size
        length = length or manifest.length_tokens
    return Workload.of(config, vocab_size, length)


def _measure(planner: Planner) -> None:
    """Time one unit of each kind here; a plan for other GPUs would not be helped by it."""
    if not torch.cuda.is_available():
        raise UserError("--measure times the model's units on a GPU, and this machine has none")
    workload = planner.workload
    device = torch.device("cuda", 0)
    sequences = MEASURED_SEQUENCES * workload.rows_per_sequence
    seconds = measure_unit_costs(
        workload.model, workload.vocab_size, workload.length, sequences, device, workload.dtype
    )
    planner.calibrate(seconds, sequences)


def _proved(
    planner: Planner, config: RunConfig, plans: Iterable[Plan], gpus: int, count: int
) -> list[tuple[Plan, DryBuild]]:
    """The first `count` plans, each dry-built, and checked as the configuration that it makes."""
    proved: list[tuple[Plan, DryBuild]] = []
    for plan in plans:
        if len(proved) == count:
            break
        problems = layout_problems(configured(config, plan), gpus)
        proof = dry_build(planner.workload, plan.layout, planner.stages(plan.layout), planner.hardware)
        problems += proof.problems
        assert not problems, f"{layout_name(plan.layout)} was planned but cannot be built: {problems}"
        proved.append((plan, proof))
    return proved


def configured(config: RunConfig, plan: Plan) -> RunConfig:
    """The run's configuration with the plan's layout."""
    training = replace(
        config.training,
        micro_batch_sequences=plan.layout.micro_batch_sequences,
        recompute_blocks=plan.layout.recompute,
    )
    return replace(config, parallel=parallel_config(plan.layout, plan.stage_units), training=training)


def _nothing_fits(planner: Planner, plans: Sequence[Plan], gpus: int) -> str:
    """By how much the smallest layout misses, and what would make it fit."""
    hardware = planner.hardware
    smallest = min(plans, key=lambda plan: plan.memory.total)
    memory, name = smallest.memory, layout_name(smallest.layout)
    missing = -smallest.free_bytes(hardware)
    lines = [
        f"nothing fits: on {gpus} GPUs the smallest layout ({name}, micro-batches of "
        f"{smallest.layout.micro_batch_sequences}) needs {memory.total / GB:.1f} GB a GPU, "
        f"{missing / GB:.1f} GB more than the {hardware.usable_bytes / GB:.1f} there are; what would help:"
    ]
    enough = (gpus * factor for factor in (2, 4, 8, 16) if ranked(planner.all_plans(gpus * factor), hardware))
    more = next(enough, None)
    if more is not None:
        lines.append(f"--gpus {more}, the fewest of its doublings on which a layout fits")
    offloaded = memory.master + memory.moments + memory.ema
    if memory.total - offloaded <= hardware.usable_bytes:
        lines.append(
            f"parallel.offload_optimizer=true with this layout, which takes {offloaded / GB:.1f} GB a GPU to the "
            "host's memory and is slower"
        )
    lines.append(f"GPUs with {(memory.total + hardware.reserved_bytes) / GB:.0f} GB, or a smaller model")
    return "\n  ".join(lines)
