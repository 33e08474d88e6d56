"""A loss or gradient that is not finite, or a spike, on one rank of real runs: nothing is learnt from it."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from pgm_scale.checkpoint.fragments import KINDS
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UnstableError
from pgm_scale.objectives.base import DrawSpec, LossTerms
from pgm_scale.objectives.pgm import PGMObjective
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training import loop
from pgm_scale.training import step as step_module
from pgm_scale.training.loop import train_on_mesh
from pgm_scale.training.stability import RollBack
from tests.distributed import run_ranks
from tests.tiny_data import tiny_config, write_tiny_data

pytestmark = pytest.mark.fault(18)

BAD_STEP, STEPS = 4, 7
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one rank": (1, {}, "fp32"),
    "ZeRO-0": (2, {"zero_stage": 0}, "fp32"),
    "ZeRO-1": (2, {"zero_stage": 1}, "fp32"),
    "ZeRO-2": (2, {"zero_stage": 2}, "fp32"),
    "ZeRO-3": (2, {"zero_stage": 3}, "fp32"),
    "ZeRO-0 bf16": (2, {"zero_stage": 0}, "bf16"),
    "ZeRO-1 bf16": (2, {"zero_stage": 1}, "bf16"),
    "ZeRO-2 bf16": (2, {"zero_stage": 2}, "bf16"),
    "ZeRO-3 bf16": (2, {"zero_stage": 3}, "bf16"),
    "offload": (2, {"zero_stage": 1, "offload_optimizer": True}, "fp32"),
    "tensor": (2, {"tensor": 2}, "fp32"),
    "sequence": (2, {"tensor": 2, "sequence_parallel": True}, "bf16"),
    "pipeline": (2, {"pipeline": 2, "stage_units": [3, 2]}, "bf16"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def _config(data: Path, run: Path, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "model": {},
        "training": {"steps": STEPS},
        "checkpoint": {"interval_steps": 1, "keep_last": 20},
        "stability": {"on_non_finite": "skip"},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return tiny_config(data, run, **sections)


@contextmanager
def _bad_terms(mesh: Mesh, kind: str, bad_steps: set[int]) -> Iterator[None]:
    """In the first micro-batch of the last rank, the first time that each of these steps is trained: a "loss" or a
    "gradient" (of a good loss) that is not finite, or a "spike"."""
    now, left = (-1, -1), set(bad_steps)
    terms_of, seed_of = PGMObjective.terms, step_module.seed_dropout

    def seed_dropout(seed: int, step: int, number: int, *place: int) -> None:
        nonlocal now
        if step != now[0]:
            left.discard(now[0])
        now = (step, number)
        seed_of(seed, step, number, *place)

    def terms(self: PGMObjective, *arguments: Any) -> LossTerms:
        found = terms_of(self, *arguments)
        if now[0] in left and now[1] == 0 and mesh.rank == mesh.world_size - 1:
            if kind == "loss":
                found.loss_S = found.loss_S * float("inf")
            elif kind == "gradient":
                found.loss_S = found.loss_S + (found.loss_S * 0).sqrt()
            else:
                found.loss_S = found.loss_S * 1000.0
        return found

    with patch.object(step_module, "seed_dropout", seed_dropout), patch.object(PGMObjective, "terms", terms):
        yield


@contextmanager
def _bad_sample(number: int) -> Iterator[None]:
    """Whoever trains on this sample has a NaN in its loss, on every run."""
    inputs_of = PGMObjective.training_inputs

    def training_inputs(self: PGMObjective, batch: TokenBatch, draws: DrawSpec) -> Any:
        inputs = inputs_of(self, batch, draws)
        if number not in batch.sample_numbers_B:
            return inputs
        rows = dataclasses.replace(inputs.rows, weight_S=inputs.rows.weight_S * torch.nan)
        return dataclasses.replace(inputs, rows=rows)

    with patch.object(PGMObjective, "training_inputs", training_inputs):
        yield


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on_mesh(config, mesh, SplitStorage(config.data.train), SplitStorage(config.data.validation))


def _tensors(run: Path, step: int) -> dict[str, np.ndarray]:
    store = CheckpointStore(run)
    return {
        f"{kind} {name}": tensor.numpy()
        for kind in KINDS
        for name, tensor in store.read_full(step, kind).items()
    }


def _equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def _records(run: Path) -> list[dict[str, Any]]:
    kept = (
        "step",
        "loss",
        "gradient_norm",
        "data_fingerprint",
        "sample_numbers",
        "skipped_updates",
        "roll_backs",
    )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in kept} for line in lines]


def _copy_up_to(run: Path, copy: Path, step: int) -> None:
    """The run as if it had been killed after the checkpoint of `step`."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def _skip_and_resume(mesh: Mesh, data: Path, folder: Path, kind: str, layouts: list[str]) -> None:
    for name in layouts:
        _, parallel, precision = LAYOUTS[name]
        changes = {"parallel": parallel, "training": {"steps": STEPS, "precision": precision}}
        with _bad_terms(mesh, kind, {BAD_STEP}):
            _train(mesh, _config(data, folder / name, **changes))
        if mesh.is_main:
            _copy_up_to(folder / name, folder / f"{name} resumed", BAD_STEP + 1)
        mesh.gather(None)
        _train(mesh, _config(data, folder / f"{name} resumed", **changes))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_update_leaves_no_trace(data: Path, tmp_path: Path, kind: str, ranks: int) -> None:
    """Weights, moments and averages stay, and a new process that starts after it does the same as this one."""
    layouts = [name for name, (world, *_) in LAYOUTS.items() if world == ranks]
    if kind == "gradient":  # what DeepSpeed does then depends on the stage and the optimizer only
        layouts = [name for name in layouts if name not in ("offload", "tensor", "sequence", "ZeRO-2 bf16")]
    run_ranks(ranks, _skip_and_resume, data, tmp_path, kind, layouts)
    for name in layouts:
        run, resumed = tmp_path / name, tmp_path / f"{name} resumed"
        before, after, later = (_tensors(run, BAD_STEP + number) for number in (0, 1, 2))
        assert _equal(before, after), name
        assert not _equal(after, later), name
        state = CheckpointStore(run).state(BAD_STEP + 1)
        assert (state["step"], state["optimizer_updates"], state["ema_updates"]) == (
            BAD_STEP + 1,
            BAD_STEP,
            BAD_STEP,
        )
        assert _equal(_tensors(run, STEPS), _tensors(resumed, STEPS)), name
        records = _records(run)
        assert records == _records(resumed), name
        assert [record.get("skipped_updates", 0) for record in records] == [0, 0, 0, 0, 1, 1, 1]
        assert records[BAD_STEP]["loss" if kind == "loss" else "gradient_norm"] is None


def _named(mesh: Mesh, config: RunConfig, kind: str) -> str:
    with _bad_terms(mesh, kind, {BAD_STEP}), pytest.raises(UnstableError) as caught:
        _train(mesh, config)
    messages = mesh.gather(str(caught.value))
    assert len(set(messages)) == 1
    return messages[0]


@pytest.mark.parametrize(("kind", "what"), [("loss", "loss"), ("gradient", "gradient norm")])
def test_stop_names_step_rank_and_samples(data: Path, tmp_path: Path, kind: str, what: str) -> None:
    config = _config(data, tmp_path, stability={"on_non_finite": "stop"}, checkpoint={"interval_steps": 3})
    message = run_ranks(2, _named, config, kind)
    assert message.startswith(f"the {what} is not finite at step 4 on rank 1 (samples 34 to 35); no weights")
    assert CheckpointStore(tmp_path).steps() == [3]
    assert len(_records(tmp_path)) == BAD_STEP


def test_every_step_is_bad(data: Path, tmp_path: Path) -> None:
    """Skipping ends at its limit, with the last good checkpoint kept."""
    config = _config(data, tmp_path, stability={"most_per_1000_steps": 2}, training={"steps": 20})

    message = run_ranks(1, _train_until_the_limit, config)
    assert "at step 5 on rank 0" in message
    assert "after 2 such steps" in message
    assert _equal(_tensors(tmp_path, 3), _tensors(tmp_path, 5))


def _train_until_the_limit(mesh: Mesh, config: RunConfig) -> str:
    with _bad_terms(mesh, "loss", set(range(3, 20))), pytest.raises(UnstableError) as caught:
        _train(mesh, config)
    return str(caught.value)


ROLL_BACK = {"on_non_finite": "roll_back", "roll_back_data_steps": 2}


def _roll_back(mesh: Mesh, config: RunConfig, sample: int, known: tuple[RollBack, ...] | None = None) -> None:
    """`known`: what the run has rolled back from before it begins."""
    with _bad_sample(sample), patch.object(loop, "read_roll_backs", lambda *_: known):
        _train(mesh, config)


@pytest.mark.parametrize("interval_steps", [1, 4])
@pytest.mark.parametrize("name", ["one rank", "ZeRO-2", "ZeRO-3 bf16", "pipeline"])
def test_a_rolled_back_run_is_one_that_never_had_the_data(
    data: Path, tmp_path: Path, name: str, interval_steps: int
) -> None:
    """Samples 40 to 47 are those of step 5: the checkpoint before it is of step 5, or of step 4."""
    ranks, parallel, precision = LAYOUTS[name]
    changes = {
        "parallel": parallel,
        "training": {"steps": 9, "precision": precision},
        "stability": ROLL_BACK,
        "checkpoint": {"interval_steps": interval_steps},
    }
    without = tmp_path / "without"
    left_out = (5, 5) if interval_steps == 1 else (4, 5)
    run_ranks(ranks, _roll_back, _config(data, tmp_path / "run", **changes), 42)
    known = (RollBack(5, 0, left_out, "by hand"),)
    run_ranks(ranks, _roll_back, _config(data, without, **changes), 42, known)
    (found,) = json.loads((tmp_path / "run" / "roll_backs.json").read_text())["roll_backs"]
    assert tuple(found["data_steps"]) == left_out
    assert "not finite on rank" in found["reason"]
    assert _equal(_tensors(tmp_path / "run", 9), _tensors(without, 9))

    def trained(run: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in record.items() if key != "roll_backs"} for record in _records(run)
        ]

    assert trained(tmp_path / "run") == trained(without)
    assert [record["step"] for record in _records(without)] == list(range(1, 10))


def _roll_back_once(mesh: Mesh, config: RunConfig, bad_steps: set[int]) -> None:
    with _bad_terms(mesh, "loss", bad_steps):
        _train(mesh, config)


def test_a_roll_back_survives_the_death_before_the_next_checkpoint(data: Path, tmp_path: Path) -> None:
    """The fault does not come again, but its data stay left out."""
    changes = {"stability": ROLL_BACK, "checkpoint": {"interval_steps": 4}, "training": {"steps": 9}}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_ranks(1, _roll_back_once, _config(data, straight, **changes), {6})
    (back,) = json.loads((straight / "roll_backs.json").read_text())["roll_backs"]
    assert (back["step"], back["checkpoint_step"], back["data_steps"]) == (6, 4, [5, 6])
    _copy_up_to(straight, killed, 4)
    run_ranks(1, _train, _config(data, killed, **changes))
    assert _equal(_tensors(straight, 9), _tensors(killed, 9))


def test_without_a_checkpoint_there_is_no_way_back(data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path, stability=ROLL_BACK, checkpoint={"interval_steps": 100})
    message = run_ranks(2, _named, config, "loss")
    assert "there is no checkpoint to roll back to" in message


def _spoilt(mesh: Mesh, config: RunConfig) -> str:
    """An update makes one weight of the last rank infinite, though loss and gradient are fine."""
    step_of = Engine.step

    def step(self: Engine, *arguments: Any) -> bool:
        updated = step_of(self, *arguments)
        if self.updates == 3 and mesh.rank == mesh.world_size - 1:
            self.state[-1].weight[-1] = float("inf")
        return updated

    with patch.object(Engine, "step", step), pytest.raises(UnstableError) as caught:
        _train(mesh, config)
    return str(caught.value)


@pytest.mark.parametrize("name", ["one rank", "ZeRO-1", "ZeRO-3"])
def test_weights_that_are_not_finite_are_never_saved(data: Path, tmp_path: Path, name: str) -> None:
    ranks, parallel, _ = LAYOUTS[name]
    message = run_ranks(ranks, _spoilt, _config(data, tmp_path, parallel=parallel))
    assert "weights are not finite after step 3, which is not saved" in message
    assert CheckpointStore(tmp_path).steps() == [1, 2]


SPIKE = {"on_spike": "skip", "spike_history_steps": 4}


def _spike(mesh: Mesh, data: Path, folder: Path) -> None:
    for run, steps in (("straight", STEPS), ("resumed", 3), ("resumed", STEPS)):
        config = _config(data, folder / run, stability=SPIKE, training={"steps": steps})
        with _bad_terms(mesh, "spike", {5}):
            _train(mesh, config)


def test_a_spike_is_skipped_and_what_it_is_compared_with_survives_a_resume(
    data: Path, tmp_path: Path
) -> None:
    """Half of the four steps before it are of the session before."""
    run_ranks(2, _spike, data, tmp_path)
    for run in ("straight", "resumed"):
        assert CheckpointStore(tmp_path / run).state(STEPS)["stability"]["skipped_steps"] == [5]
        assert _equal(_tensors(tmp_path / run, 5), _tensors(tmp_path / run, 6))
    assert _equal(_tensors(tmp_path / "straight", STEPS), _tensors(tmp_path / "resumed", STEPS))
