"""`make parity`: every parallel layout against one process, on the CPU; the result goes into the README.

Small models train five steps through the real loop in every layout of at most eight ranks. Losses, gradient norms,
validation NLL, weights, Adam moments and EMA are compared with those of one process that has the whole batch in one
forward pass, and so are, bit for bit, the draws of every sample.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from ops.parity_layouts import (
    BF16,
    BF16_BOUNDS,
    BF16_ITSELF,
    DATA,
    FP32_BOUNDS,
    FP32_SECTIONS,
    GRID,
    MODELS,
    MOST_RANKS,
    PIPELINE,
    STAGES,
    TENSOR,
    Bounds,
    Section,
    layout,
)
from ops.parity_runs import LEARNING_RATE, STEPS, Case, differences, same_draws, train_recorded, write_data
from ops.readme import ROOT, write_section
from pgm_scale.config import RunConfig
from pgm_scale.files import atomic_write_bytes
from pgm_scale.parallel.launch import Launch, free_port
from pgm_scale.parallel.layout import layout_problems
from pgm_scale.parallel.mesh import connected

DRAWS = "draws.json"
TIMEOUT_S = 120.0  # of a collective; a layout that hangs fails
QUANTITIES = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "validation_nll": "validation NLL",
    "weight": "weights",
    "weight_rms": "weights, RMS",
    "ema": "EMA",
    "exp_avg": "1st moment",
    "exp_avg_relative": "relative",
    "exp_avg_sq": "2nd moment",
}


@dataclass(frozen=True)
class Result:
    """How far a case is from what it is compared with; one that was not run has a reason instead."""

    case: Case
    section: str
    bounds: Bounds
    differences: dict[str, float] = field(default_factory=dict)
    same_draws: bool = False
    reason: str = ""
    refused: bool = False

    @property
    def held(self) -> bool:
        if self.refused:
            return True
        return self.same_draws and all(self.differences[name] <= bound for name, bound in self.bounds.items())

    def to_json(self) -> dict[str, Any]:
        return {"case": self.case.name, "held": self.held} | {
            key: value
            for key in ("differences", "same_draws", "reason")
            if (value := getattr(self, key)) or key == "same_draws"
        }


class Runs:
    """Runs in one temporary folder: `run` the cases, then ask for the `result` of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_data(folder / "data")

    def run(self, cases: Iterable[Case]) -> None:
        """Run each case once; one that fails has no result."""
        ordered = sorted(dict.fromkeys(cases), key=lambda case: case.world_size)
        for number, case in enumerate(ordered, 1):
            started_s = time.monotonic()
            try:
                launch(case.world_size, self._config(case))
            except (ProcessRaisedException, ProcessExitedException):
                traceback.print_exc()
            took_s = time.monotonic() - started_s
            print(
                f"{number:3}/{len(ordered)}  {case.world_size} ranks  {took_s:4.1f} s  {case.name}",
                flush=True,
            )

    def refusal(self, case: Case) -> str:
        """Why this case is not run: too many ranks, or the product's own reasons; empty if it is."""
        if case.world_size > MOST_RANKS:
            return f"{case.world_size} ranks"
        return "; ".join(layout_problems(self._config(case), case.world_size))

    def result(self, case: Case, section: Section) -> Result:
        unknown = Result(case, section.title, section.bounds)
        if refusal := self.refusal(case):
            return dataclasses.replace(unknown, reason=refusal, refused=True)
        run, expected = self._run(case), self._run(section.against(case))
        if not ((run / DRAWS).exists() and (expected / DRAWS).exists()):
            return dataclasses.replace(unknown, reason="failed")
        found, (on_one,) = (json.loads((folder / DRAWS).read_text()) for folder in (run, expected))
        return dataclasses.replace(
            unknown,
            differences=differences(run, expected),
            same_draws=same_draws(found, on_one, case.parallel),
        )

    def _config(self, case: Case) -> RunConfig:
        return case.config(self.data, self.folder)

    def _run(self, case: Case) -> Path:
        return Path(self._config(case).folder)


def launch(world_size: int, config: RunConfig) -> None:
    """Train on `world_size` gloo ranks, each a process forked from one that has all imports."""
    arguments = (world_size, free_port(), config)
    start_processes(_rank_main, arguments, nprocs=world_size, start_method="forkserver")


def _rank_main(rank: int, world_size: int, port: int, config: RunConfig) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:  # logs and libraries' warnings; errors are raised
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    with connected(Launch("torchrun", rank, world_size, rank, "127.0.0.1", port), TIMEOUT_S) as mesh:
        draws = train_recorded(mesh, config)
    if rank == 0:
        (Path(config.folder) / DRAWS).write_text(json.dumps(draws))


def main() -> int:
    started_s = time.monotonic()
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    multiprocessing.set_forkserver_preload(
        ["ops.parity_runs", "pgm_scale.parallel.pipeline", "pgm_scale.parallel.tensor_layers"]
    )
    sections = (*FP32_SECTIONS, BF16, BF16_ITSELF)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        runs = Runs(Path(folder))
        pairs = [(case, section.against(case)) for section in sections for case in section.cases]
        runs.run(case for pair in pairs if not runs.refusal(pair[0]) for case in reversed(pair))
        results = [runs.result(case, section) for section in sections for case in section.cases]
    write_json(results)
    write_section("parity", text(results))
    missed = [result for result in results if not result.held]
    for result in missed:
        print(f"MISSED  {result.section}: {result.case.name} {result.reason} {result.differences}")
    ran = sum(not result.refused for result in results)
    print(f"{ran - len(missed)} of {ran} layouts held their bounds; {time.monotonic() - started_s:.0f} s")
    return 1 if missed else 0


def write_json(results: Sequence[Result]) -> None:
    """All differences, unrounded."""
    tree = {
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
        "bounds": {"fp32": FP32_BOUNDS, "bf16": BF16_BOUNDS},
        "sections": {
            title: [result.to_json() for result in results if result.section == title]
            for title in dict.fromkeys(result.section for result in results)
        },
    }
    atomic_write_bytes(ROOT / "ops/bench/parity.json", (json.dumps(tree, indent=1) + "\n").encode())


def text(results: Sequence[Result]) -> list[str]:
    """The tables and what they mean."""
    return [
        f"Largest difference of losses and gradient norms of {STEPS} steps and of the weights after them to one "
        f"process with the whole batch in one pass, fp32 (bound {FP32_BOUNDS['loss']:.0e}). Refused: a pipeline "
        f"needs ZeRO-1. Layouts of more than {MOST_RANKS} ranks are left out.",
        "",
        *grid_table(results),
        "",
        "The same and more by section. *Relative*: norm of the difference of a tensor's first moment over its "
        "norm, in the worst tensor; a gradient that is summed twice would show there. bf16 rounds values to 2^-9: "
        "a layout is as far from one process in bf16 as that is from fp32. The bounds, in `ops/parity_layouts.py`, "
        "are a few times that.",
        "",
        *section_table(results),
        "",
        draws_line(results),
    ]


def grid_table(results: Sequence[Result]) -> list[str]:
    """A row for each TP x PP x DP, a column for each model and ZeRO stage."""
    cells = {result.case: result for result in results if result.section == GRID.title}
    lines = [
        "| TP x PP x DP | " + " | ".join(f"{m} ZeRO-{z}" for m, z in product(MODELS, STAGES)) + " |",
        "|---" * (1 + len(MODELS) * len(STAGES)) + "|",
    ]
    for tensor, pipeline, data in product(TENSOR, PIPELINE, DATA):
        if tensor * pipeline * data > MOST_RANKS:
            continue
        row = [cells[layout(m, tensor, pipeline, data, z)] for m, z in product(MODELS, STAGES)]
        lines.append(f"| {tensor} x {pipeline} x {data} | " + " | ".join(map(_cell, row)) + " |")
    return lines


def _cell(result: Result) -> str:
    """The largest of the differences of loss, gradient norm and weights."""
    if not result.differences:
        return "refused" if result.refused else "**failed**"
    return _number([result.differences[name] for name in ("loss", "gradient_norm", "weight")], result.held)


def section_table(results: Sequence[Result]) -> list[str]:
    """The largest difference of each quantity in each section."""
    lines = [
        "| largest difference | layouts | " + " | ".join(QUANTITIES.values()) + " |",
        "|---" * (2 + len(QUANTITIES)) + "|",
    ]
    for title in dict.fromkeys(result.section for result in results):
        ran = [r for r in results if r.section == title and not r.refused]
        found = [r for r in ran if r.differences]
        largest = (_number([r.differences[name] for r in found], _kept(found, name)) for name in QUANTITIES)
        count = f"{len(ran)}" if len(found) == len(ran) else f"**{len(found)} of {len(ran)}**"
        lines.append(f"| {title} | {count} | " + " | ".join(largest) + " |")
    return lines


def draws_line(results: Sequence[Result]) -> str:
    ran = [result for result in results if not result.refused]
    same = sum(result.same_draws for result in ran)
    return f"Every rank drew for every sequence the same bits as one process in {same} of {len(ran)} layouts."


def _kept(results: Sequence[Result], name: str) -> bool:
    return all(result.differences[name] <= result.bounds.get(name, math.inf) for result in results)


def _number(values: Sequence[float], held: bool) -> str:
    text = f"{np.max(values):.0e}" if values else "-"
    return text if held else f"**{text}**"


if __name__ == "__main__":
    sys.exit(main())
