"""Saves that are written while the values go on changing."""

import os
import random
import signal
import threading
from functools import partial

import pytest

from pgm_scale.checkpoint import CheckpointStore, writing
from pgm_scale.errors import UserError
from tests.checkpoint.support import (
    assert_step_is_good,
    fragments_of,
    in_child,
    kill_before_call,
    run_ranks,
    save_step,
    step_folder,
    whole_tensors,
)


def start(store, step):
    """Begin to save; the values are destroyed as soon as they may be, as training would change them."""
    peers, tensors = store.peers, whole_tensors(step)
    started = store.start(step, fragments_of(tensors, peers.rank, peers.world_size), {"step": step})
    if started:
        store.under_way.write.wait_until_copied(peers.progress)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    return started


def start_and_finish(store, step):
    if start(store, step):
        store.finish()


def files(run_folder, step):
    return {path.name: path.read_bytes() for path in step_folder(run_folder, step).iterdir()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_its_files_are_those_of_a_save_in_the_foreground(tmp_path, world_size):
    def program(peers):
        store = CheckpointStore(tmp_path / "background", peers)
        for step in (1, 2):
            start_and_finish(store, step)
        assert start(store, 2) is False, "it is committed"
        assert store.under_way is None

    assert run_ranks(world_size, program) == [None] * world_size
    for step in (1, 2):
        save_step(tmp_path / "foreground", step, world_size)
        assert files(tmp_path / "background", step) == files(tmp_path / "foreground", step)


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written before it is set."""
    gate, write = threading.Event(), writing._write_quietly

    def waiting(*arguments):
        assert gate.wait(20)
        return write(*arguments)

    monkeypatch.setattr(writing, "_write_quietly", waiting)
    return gate


def test_values_may_change_before_anything_is_written(tmp_path, gate):
    store = CheckpointStore(tmp_path)
    start(store, 1)
    assert store.under_way is not None
    assert store.under_way.write.is_running
    assert store.steps() == []
    gate.set()
    store.finish()
    assert_step_is_good(store, 1)
    assert store.under_way is None


@pytest.mark.fault(1)
def test_giving_up_stops_the_write_and_leaves_what_recovery_removes(tmp_path, gate):
    save_step(tmp_path, 1)
    store = CheckpointStore(tmp_path)
    start(store, 2)
    threading.Timer(0.05, gate.set).start()
    store.give_up()
    assert store.under_way is not None
    assert store.under_way.write.has_failed
    again = CheckpointStore(tmp_path)
    again.recover()
    assert again.newest_verified() == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["LATEST", "step_00000001"]


def _fail(error, *_):
    raise error


@pytest.mark.fault(9)
def test_a_failed_write_fails_the_save_on_every_rank(tmp_path, monkeypatch):
    save_step(tmp_path, 1)

    def program(peers):
        store = CheckpointStore(tmp_path, peers)
        if peers.rank == 1:
            error = OSError(28, "No space left on device", "rank_00001")
            monkeypatch.setattr(store.folders, "write_rank", partial(_fail, error))
        start(store, 2)
        store.finish()

    for result in run_ranks(3, program):
        assert isinstance(result, UserError)
        assert "checkpoint of step 2 not saved" in str(result)
        assert "rank 1: No space left on device: rank_00001" in str(result)
        assert "earlier checkpoints are intact" in str(result)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["LATEST", "step_00000001"]
    run_ranks(3, lambda peers: start_and_finish(CheckpointStore(tmp_path, peers), 2))
    assert_step_is_good(CheckpointStore(tmp_path), 2)


def test_a_bug_keeps_its_type(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(store.folders, "write_rank", partial(_fail, ZeroDivisionError("ours")))
    start(store, 1)
    with pytest.raises(ZeroDivisionError, match="ours"):
        store.finish()


@pytest.mark.fault(1)
@pytest.mark.fault(2)
def test_any_chain_of_deaths_loses_no_committed_step(tmp_path):
    """FAULTS 1 and 2, in the background: each life is killed somewhere, many while the thread writes."""
    dice = random.Random(3)
    committed, log = tmp_path / "committed", tmp_path / "log"
    committed.write_text("0")

    def life(point):
        kill_before_call(point, log)
        store = CheckpointStore(tmp_path)
        store.recover()
        first = store.newest_verified() or 0
        for step in range(first + 1, first + 4):
            start_and_finish(store, step)
            committed.write_text(str(step))
            store.purge(keep_last=2)

    died_after = set()
    for _ in range(40):
        log.unlink(missing_ok=True)
        status, error = in_child(partial(life, dice.randrange(45)))
        assert error is None
        if status != 0:
            assert os.WTERMSIG(status) == signal.SIGKILL
            died_after.add(log.read_text().splitlines()[-1].split()[0] if log.exists() else "nothing")
        store = CheckpointStore(tmp_path)
        store.recover()
        newest = store.newest_verified()
        assert (newest or 0) >= int(committed.read_text())
        if newest is not None:
            assert_step_is_good(store, newest)
    assert died_after >= {"mkdir", "fsync", "rename", "replace"}


@pytest.mark.fault(1)
def test_killed_while_the_background_writes(tmp_path):
    """The process dies in the writing thread itself, with some of the file on the disk."""
    save_step(tmp_path, 1)

    def die(path, chunks, *_):
        path.write_bytes(bytes(next(iter(chunks)).data[:100]))
        os.kill(os.getpid(), signal.SIGKILL)

    def life():
        writing._write_quietly = die
        start_and_finish(CheckpointStore(tmp_path), 2)

    status, _ = in_child(life)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "checkpoints" / ".step_00000002.saving" / "rank_00000.safetensors").exists()
    store = CheckpointStore(tmp_path)
    store.recover()
    assert store.newest_verified() == 1
    start_and_finish(store, 2)
    assert_step_is_good(store, 2)
