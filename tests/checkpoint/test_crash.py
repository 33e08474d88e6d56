"""FAULTS 1 and 2: real processes, killed at every durable operation of a save, a purge, a recovery."""

import os
import random
import signal
from functools import partial

import pytest

from pgm_scale.checkpoint import CheckpointStore
from tests.checkpoint.support import (
    assert_step_is_good,
    fragments_of,
    in_child,
    kill_before_call,
    save_step,
    whole_tensors,
)


def resume(run_folder):
    store = CheckpointStore(run_folder)
    store.recover()
    return store, store.newest_verified()


@pytest.mark.fault(1)
@pytest.mark.fault(2)
def test_killed_at_every_point_of_a_save_and_a_purge(tmp_path):
    newest_at, log = {}, tmp_path / "log"
    for point in range(100):
        run_folder = tmp_path / f"run{point}"
        save_step(run_folder, 1)
        log.unlink(missing_ok=True)

        def save_and_purge(run_folder=run_folder, point=point):
            kill_before_call(point, log)
            save_step(run_folder, 2)
            CheckpointStore(run_folder).purge(keep_last=1)

        status, _ = in_child(save_and_purge)
        last_done = log.read_text().splitlines()[-1] if log.exists() else "nothing"
        store, newest = resume(run_folder)
        assert newest is not None
        assert_step_is_good(store, newest)
        left = set(os.listdir(run_folder / "checkpoints"))
        assert left <= {"LATEST", "step_00000001", "step_00000002"}
        assert (run_folder / "checkpoints" / "LATEST").read_text() == f"step_{newest:08d}\n"
        save_step(run_folder, 3, world_size=1)
        assert resume(run_folder)[1] == 3
        newest_at[last_done] = newest
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        raise AssertionError("the child never finished")
    # The page cache outlives a killed process, so the step counts from the moment its manifest is written.
    assert newest_at["fsync rank_00001.safetensors"] == 1
    assert newest_at["fsync manifest.json"] == 2
    assert newest_at["rename .step_00000002.saving"] == 2
    assert newest_at["rename step_00000001"] == 2, "killed in the purge"
    assert len(newest_at) >= 10


@pytest.mark.fault(1)
def test_the_order_of_durable_operations(tmp_path):
    """What a power cut relies on, and a killed process cannot show: each is durable before the next starts."""
    save_step(tmp_path, 1)

    def save():
        kill_before_call(1000, tmp_path / "log")
        save_step(tmp_path, 2)

    assert in_child(save) == (0, None)
    assert (tmp_path / "log").read_text().splitlines() == [
        "mkdir .step_00000002.saving",
        "fsync rank_00000.safetensors",
        "fsync rank_00001.safetensors",
        "fsync state.json",
        "fsync manifest.json",
        "fsync .step_00000002.saving",
        "rename .step_00000002.saving",
        "fsync checkpoints",
        "fsync .LATEST.writing",
        "replace .LATEST.writing",
        "fsync checkpoints",
    ]


@pytest.mark.fault(1)
@pytest.mark.fault(2)
def test_any_chain_of_deaths_and_resumes_loses_no_committed_step(tmp_path):
    """Each life recovers, saves and purges until it is killed somewhere; some die in the recovery itself."""
    dice = random.Random(2)
    committed = tmp_path / "committed"
    committed.write_text("0")

    def life(point):
        kill_before_call(point)
        store, newest = resume(tmp_path)
        first = newest or 0
        for step in range(first + 1, first + 4):
            store.save(step, fragments_of(whole_tensors(step), 0, 1), {"step": step})
            committed.write_text(str(step))
            store.purge(keep_last=2)

    kills = 0
    for _ in range(40):
        status, error = in_child(partial(life, dice.randrange(60)))
        assert error is None
        kills += status != 0
        store, newest = resume(tmp_path)
        assert (newest or 0) >= int(committed.read_text())
        if newest is not None:
            assert_step_is_good(store, newest)
    assert kills >= 20
