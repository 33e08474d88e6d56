"""Saves in the background of real runs: the same files, errors on all ranks at once, signals that wait."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pgm_scale.checkpoint import writing
from pgm_scale.checkpoint.step_folders import StepFolders
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import Preempted, UserError
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.loop import train_on_mesh
from tests.distributed import run_ranks
from tests.tiny_data import tiny_config, write_tiny_data

SLOW_S = 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on_mesh(config, mesh, SplitStorage(config.data.train), SplitStorage(config.data.validation))


def _train_all(mesh: Mesh, configs: list[RunConfig]) -> None:
    for config in configs:
        _train(mesh, config)


def _files(run: Path) -> dict[str, bytes]:
    """All that was saved but the state, which names the run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("rank_*.safetensors")}


@pytest.mark.parametrize(("ranks", "stages"), [(1, (0, 1, 3)), (2, (0, 1, 2, 3))])
def test_the_files_are_those_of_saves_that_training_waits_for(
    data: Path, tmp_path: Path, ranks: int, stages: tuple[int, ...]
) -> None:
    """A save at every step: each starts while the one before may still be written."""
    configs = [
        tiny_config(
            data,
            tmp_path / f"{stage}-{asynchronous}",
            parallel={"zero_stage": stage},
            checkpoint={"interval_steps": 1, "keep_last": 10, "asynchronous": asynchronous},
        )
        for stage in stages
        for asynchronous in (False, True)
    ]
    run_ranks(ranks, _train_all, configs)
    for stage in stages:
        waited, trained_on = _files(tmp_path / f"{stage}-False"), _files(tmp_path / f"{stage}-True")
        assert len(waited) == 6 * ranks
        assert trained_on == waited
        assert CheckpointStore(tmp_path / f"{stage}-True").newest_verified() == 6


def _train_with_slow_writes(mesh: Mesh, config: RunConfig, slow_ranks: tuple[int, ...]) -> None:
    """On some ranks a write in the background begins late, so that steps pass meanwhile."""
    write = writing._write_quietly

    def late(*arguments: Any) -> Any:
        if mesh.rank in slow_ranks:
            time.sleep(SLOW_S)
        return write(*arguments)

    with patch.object(writing, "_write_quietly", late):
        _train(mesh, config)


def test_a_save_that_is_due_waits_for_the_one_before(data: Path, tmp_path: Path) -> None:
    """One rank writes slowly: nothing is committed by halves, and the time of waiting is reported."""
    config = tiny_config(data, tmp_path, checkpoint={"interval_steps": 2, "keep_last": 9})
    run_ranks(2, _train_with_slow_writes, config, (1,))
    store = CheckpointStore(tmp_path)
    assert store.steps() == [2, 4, 6]
    for step in store.steps():
        store.verify(step)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    held_s = sum(json.loads(line)["checkpoint_s"] for line in lines)
    assert held_s > SLOW_S / 2, "step 4 had to wait for step 2"


def test_old_steps_are_purged_when_the_new_one_is_committed(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, checkpoint={"interval_steps": 1, "keep_last": 2})
    run_ranks(2, _train_all, [config])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["LATEST", "step_00000005", "step_00000006"]


def _train_on_a_full_disk(mesh: Mesh, config: RunConfig) -> list[str]:
    """Rank 1 cannot write step 2; what each rank raised."""
    write_rank = StepFolders.write_rank

    def full(self: StepFolders, step: int, rank: int, *arguments: Any) -> Any:
        if (step, rank) == (2, 1):
            raise OSError(28, "No space left on device", "rank_00001")
        return write_rank(self, step, rank, *arguments)

    with patch.object(StepFolders, "write_rank", full), pytest.raises(UserError) as caught:
        _train(mesh, config)
    return mesh.gather(str(caught.value))


@pytest.mark.fault(9)
def test_a_failed_write_ends_all_ranks_within_a_step(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, training={"steps": 30}, checkpoint={"interval_steps": 1})
    first, second = run_ranks(2, _train_on_a_full_disk, config)
    assert first == second
    assert "checkpoint of step 2 not saved" in first
    assert "rank 1: No space left on device: rank_00001" in first
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["LATEST", "step_00000001"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps in ([1, 2], [1, 2, 3]), "it failed in step 3, which may have been recorded"


def _train_with_a_signal(mesh: Mesh, config: RunConfig) -> str:
    """The last rank gets a signal when the first save begins, which takes some steps."""
    start = CheckpointStore.start

    def signalled(self: CheckpointStore, *arguments: Any) -> bool:
        if mesh.rank == mesh.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return start(self, *arguments)

    with patch.object(CheckpointStore, "start", signalled), pytest.raises(Preempted) as caught:
        _train_with_slow_writes(mesh, config, (0, 1))
    return str(caught.value)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_signal_waits_for_the_save_under_way_and_saves_its_own_step(
    data: Path, tmp_path: Path, interval: int
) -> None:
    """The step after the signal is one to save at anyway, or not."""
    config = tiny_config(data, tmp_path, training={"steps": 30}, checkpoint={"interval_steps": interval})
    message = run_ranks(2, _train_with_a_signal, config)
    assert f"stopped by a signal after step {interval + 1}" in message
    store = CheckpointStore(tmp_path)
    assert store.steps() == [interval, interval + 1]
    for step in store.steps():
        store.verify(step)
        assert store.state(step)["step"] == step
