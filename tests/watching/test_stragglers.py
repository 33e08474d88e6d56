"""Slow ranks: the judgement on made-up seconds, and two real ranks of which one sleeps."""

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from pgm_scale.config import RunConfig
from pgm_scale.data.loader import TokenLoader
from pgm_scale.data.storage import SplitStorage
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.loop import train_on_mesh
from pgm_scale.training.metrics import ConsoleReport
from pgm_scale.watching.stragglers import ForwardClock, Straggler, StragglerReport, slowest_rank
from tests.distributed import run_ranks
from tests.tiny_data import tiny_config, write_tiny_data

SLEEP_S = 0.15  # a step: longer than what a loaded machine takes for a tiny one


def test_the_median_of_two_does_not_hide_the_slow_one() -> None:
    assert slowest_rank(np.array([[1.0, 2.0], [1.0, 8.0]]), [0, 0]) == (1, 3.0, 6.0, "compute")
    assert slowest_rank(np.array([[7.0, 2.0], [1.0, 2.0]]), [0, 0]) == (0, 3.0, 6.0, "data")


def test_a_rank_without_peers_is_not_compared() -> None:
    assert slowest_rank(np.array([[1.0, 2.0]]), [0]) is None
    assert slowest_rank(np.array([[1.0, 2.0], [9.0, 9.0]]), [0, 1]) is None


def test_only_ranks_of_one_stage_are_compared() -> None:
    """The second stage is three times as long; within it nobody is slow, and in the first rank 1 is."""
    seconds = np.array([[0.0, 1.0], [0.0, 1.5], [0.0, 3.0], [0.0, 3.1]])
    rank, ratio, excess_s, part = slowest_rank(seconds, [0, 0, 1, 1]) or (0, 0.0, 0.0, "")
    assert (rank, ratio, excess_s, part) == (1, 1.5, 0.5, "compute")


def test_it_is_the_largest_ratio_of_all_ranks() -> None:
    """Against the definition, rank by rank."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        ranks = int(generator.integers(2, 9))
        stages = generator.integers(0, 2, ranks).tolist()
        seconds = generator.exponential(size=(ranks, 2))
        ratios = {}
        for rank in range(ranks):
            others = [o for o in range(ranks) if o != rank and stages[o] == stages[rank]]
            if others:
                usual_s = float(np.median([seconds[other].sum() for other in others]))
                ratios[rank] = seconds[rank].sum() / usual_s
        found = slowest_rank(seconds, stages)
        if not ratios:
            assert found is None
            continue
        assert found is not None
        assert found[0] == max(ratios, key=lambda rank: ratios[rank])
        assert found[1] == pytest.approx(ratios[found[0]])


def test_ranks_that_take_no_time_are_no_error() -> None:
    found = slowest_rank(np.zeros((3, 2)), [0, 0, 0])
    assert found is not None
    assert found[1:3] == (0.0, 0.0)


def test_the_clock_counts_forward_passes_in_training_only() -> None:
    class Slow(nn.Module):
        def forward(self) -> torch.Tensor:
            time.sleep(0.05)
            return torch.ones((), requires_grad=True)

    module = Slow()
    clock = ForwardClock(module, torch.device("cpu"))
    module()
    time.sleep(0.2)  # not of the module
    module()
    taken_s = clock.take()
    assert taken_s >= 0.1
    assert clock.take() == 0
    module.eval()
    module()
    assert clock.take() == 0


def _train_slowly(
    mesh: Mesh, config: RunConfig, part: str, slow_steps: range
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rank 1 sleeps in reading, or in its forward passes, in some steps. Records, and lines of the console."""
    cls: Any = TokenLoader if part == "data" else PartitionTransformer
    name = "read" if part == "data" else "forward"
    original, calls = getattr(cls, name), 0
    said: list[str] = []

    def sleepy(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        training = part == "data" or self.training
        if training and mesh.rank == 1 and calls in slow_steps:
            time.sleep(SLEEP_S)
        calls += training
        return original(self, *arguments, **options)

    with (
        patch.object(cls, name, sleepy),
        patch.object(ConsoleReport, "say", lambda self, line: said.append(line)),
    ):
        train_on_mesh(config, mesh, SplitStorage(config.data.train), SplitStorage(config.data.validation))
    lines = (Path(config.folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], said


@pytest.mark.fault(17)
@pytest.mark.parametrize("part", ["data", "compute"])
def test_a_sleeping_rank_is_named(tmp_path: Path, part: str) -> None:
    """Five records of 4 steps, of one micro-batch: the first is the warm-up, and the next two may be chance."""
    data = write_tiny_data(tmp_path / "data")
    alerts = tmp_path / "alerts"
    config = tiny_config(
        data,
        tmp_path / "run",
        training={"steps": 20, "micro_batch_sequences": 4, "log_interval_steps": 4},
        checkpoint={"interval_steps": 20},
        validation={"interval_steps": 20, "samples": 0},
        watching={"alert_command": f'echo "$PGM_SCALE_EVENT $PGM_SCALE_MESSAGE" >> {alerts}'},
    )
    records, said = run_ranks(2, _train_slowly, config, part, range(20))
    assert [record["step"] for record in records] == [4, 8, 12, 16, 20]
    assert not any("slowest_rank" in record for record in records[:3])
    for record in records[3:]:
        assert record["slowest_rank"] == 1
        assert record["slowest_part"] == part
        assert record["slowest_ratio"] > 1.5
        assert record["slowest_host"]
    (line,) = [line for line in said if "is slow in" in line]  # not at every record
    what = {"data": "waiting for data", "compute": "computing"}[part]
    assert line.startswith(f"step 16: rank 1 on host {records[3]['slowest_host']} is slow in {what}: ")
    deadline_s = time.monotonic() + 30
    while not alerts.exists() or alerts.read_text().count("straggler") == 0:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert alerts.read_text().count("straggler") == 1
    assert line in alerts.read_text()


def _named(numbers: list[np.ndarray]) -> list[Straggler | None]:
    """What is found of the own seconds of two ranks and the interval's, record by record, behind the warm-up."""
    mesh, waiting = Mesh(0, 2, 0, torch.device("cpu")), iter([100 * numbers[0], *numbers])
    with (
        patch.object(Mesh, "gather", lambda self, value: [value, (0, "node2")]),
        patch.object(Mesh, "gather_numbers", lambda self, _: next(waiting)),
    ):
        report = StragglerReport(nn.Linear(1, 1), mesh, 1.5)
        assert report.find(0.0) is None, "the warm-up"
        assert report.ratio is None
        found = [report.find(0.0) for _ in numbers]
    assert report.ratio is not None
    return found


EVEN = np.array([[0.0, 1.0, 5.0], [0.0, 1.0, 5.0]])
FIRST = np.array([[0.0, 2.5, 5.0], [0.0, 1.0, 5.0]])
SECOND = np.array([[0.0, 1.0, 5.0], [0.0, 2.5, 5.0]])


def test_a_rank_is_named_when_it_stays_slow() -> None:
    found = _named([SECOND, SECOND, SECOND, SECOND, EVEN, SECOND])
    assert [straggler is not None for straggler in found] == [False, False, True, True, False, False]
    assert found[2] == Straggler(1, "node2", 2.5, "compute")
    assert found[2].record()["slowest_host"] == "node2"


def test_ranks_that_are_slow_in_turn_are_a_busy_machine() -> None:
    assert _named([FIRST, FIRST, SECOND, SECOND, FIRST, EVEN, FIRST, FIRST, SECOND]) == [None] * 9


def test_a_short_slowness_is_noise() -> None:
    """Three times as slow as the other, for some milliseconds a record or for little of a long one."""
    rows = np.array([[0.0, 0.01, 0.1], [0.0, 0.03, 0.1]])
    for factor, named in ((1, False), (3, False), (20, True), (100, True)):
        assert (_named([factor * rows] * 3)[-1] is not None) == named, factor
    rare = 20 * rows
    rare[:, 2] = 10.0
    assert _named([rare] * 3)[-1] is None
