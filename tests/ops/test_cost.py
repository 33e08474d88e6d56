"""Predicted times become days and GPU-hours rightly, and the shipped layouts fit their GPUs."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ops import cost
from ops.slurm_examples import PUBLISHED, SCALE
from pgm_scale import config as configuration
from pgm_scale.planning.layouts import Layout

LM1B = PUBLISHED[0]


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def _plan_that_leaves(free_bytes) -> Any:
    return SimpleNamespace(free_bytes=lambda hardware: free_bytes)


def number(cell):
    return float(cell.replace(",", ""))


def test_a_run_costs_its_steps_on_all_its_gpus():
    name, gpus, layout, memory, step_s, tokens_per_s, steps, days, hours, paper = cells(
        *cost.run_rows(PUBLISHED[:1])
    )
    assert (name, gpus, paper) == ("lm1b.yaml", "8 x A100 SXM4 80GB", "0.92")
    assert layout == "TP1 PP1 DP8 ZeRO-1, 1 x 64"
    assert 0 < number(memory.split()[0]) < number(memory.split()[2])
    config = configuration.load(LM1B.config)
    assert number(steps) == config.training.steps
    assert number(tokens_per_s) * number(step_s) == pytest.approx(512 * 128, rel=0.02)
    assert number(days) * 86_400 == pytest.approx(number(steps) * number(step_s), rel=0.02)
    assert number(hours) == pytest.approx(8 * 24 * number(days), rel=0.02)


@pytest.mark.parametrize("example", [SCALE[0], SCALE[1], SCALE[-1]], ids=lambda example: example.name)
def test_shipped_layouts_leave_a_tenth_of_the_memory(example):
    config = configuration.load(example.config)
    hardware = cost.hardware_of(example.cluster)
    layout = Layout.of(config, example.nodes * hardware.gpus_per_node)
    plan = cost.run_planner(example, config, hardware).predict(layout)
    assert cost.roomy([plan], hardware) is plan
    if config.parallel.stage_units:  # as the planner splits them
        assert plan.stage_units == config.parallel.stage_units


def test_twenty_tokens_a_parameter_are_trained():
    hardware = cost.hardware_of(cost.CLUSTER)
    for example in SCALE:
        config = configuration.load(example.config)
        tokens = config.training.steps * config.training.global_batch_sequences * cost.LENGTH
        planner = cost.run_planner(example, config, hardware)
        assert tokens == pytest.approx(cost.TOKENS_PER_PARAMETER * cost.parameters(planner), rel=0.01)


def test_a_plan_without_room_is_passed_over():
    hardware = dataclasses.replace(cost.hardware_of(cost.CLUSTER), memory_bytes=105.0, reserved_bytes=5.0)
    tight, roomy = (_plan_that_leaves(free_bytes) for free_bytes in (9.0, 11.0))
    assert cost.roomy([tight, roomy], hardware) is roomy
    assert cost.roomy([tight], hardware) is None


@pytest.mark.parametrize(
    ("days", "text"),
    [(0.0041, "0.0041"), (0.123, "0.12"), (1.42, "1.4"), (12.4, "12"), (4321.0, "4,321")],
)
def test_days(days, text):
    assert cost._days(days) == text


def test_the_written_tables_have_every_run_and_size():
    text = Path("ops/bench/costs.md").read_text()
    tables = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    assert {len(cells(row)) for row in tables} == {10, 11}
    first = [cells(row)[0] for row in tables]
    for example in (*PUBLISHED, *SCALE):
        assert example.config.removeprefix("configs/") in first
    assert set(cost.SIZES) <= set(first)
    assert "none of them measured" in text
