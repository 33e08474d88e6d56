import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pgm_scale.checkpoint import CheckpointStore, Fragment
from pgm_scale.errors import UserError
from pgm_scale.tensor_slices import TensorSlice
from tests.checkpoint.support import (
    assert_step_is_good,
    fragments_of,
    in_child,
    run_ranks,
    save_step,
    step_folder,
    whole_tensors,
)


def save(store, step, peers=None):
    rank, world_size = (peers.rank, peers.world_size) if peers else (0, 1)
    return store.save(step, fragments_of(whole_tensors(step), rank, world_size), {"step": step})


def test_nothing_saved_yet(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    assert store.newest_verified() is None
    assert store.steps() == []
    assert not (tmp_path / "run").exists(), "asking must not create anything"


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_save_and_another_world_size_reads(tmp_path, world_size):
    saved = run_ranks(world_size, lambda peers: save(CheckpointStore(tmp_path, peers), 7, peers))
    assert saved == [True] * world_size
    names = sorted(path.name for path in step_folder(tmp_path, 7).iterdir())
    ranks = [f"rank_{rank:05d}.safetensors" for rank in range(world_size)]
    assert names == ["manifest.json", *ranks, "state.json"]
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step_00000007\n"
    assert run_ranks(2, lambda peers: CheckpointStore(tmp_path, peers).newest_verified()) == [7, 7]
    assert_step_is_good(CheckpointStore(tmp_path), 7)


def test_saving_a_committed_step_again_writes_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    assert save(store, 3)
    before = (step_folder(tmp_path, 3) / "manifest.json").stat().st_mtime_ns
    assert run_ranks(2, lambda peers: save(CheckpointStore(tmp_path, peers), 3, peers)) == [False, False]
    assert (step_folder(tmp_path, 3) / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.fault(1)
def test_leftovers_of_a_larger_world_do_not_enter_the_next_save(tmp_path):
    folders = CheckpointStore(tmp_path).folders
    folders.begin(1)
    folders.write_rank(1, 5, fragments_of(whole_tensors(1), 0, 1))
    save_step(tmp_path, 1, world_size=2)
    assert CheckpointStore(tmp_path).newest_verified() == 1


def test_state_floats_are_exact(tmp_path):
    state = {"loss": 0.1 + 0.2, "next_sample_number": 2**53 + 1, "config": {"name": "ä"}}
    store = CheckpointStore(tmp_path)
    store.save(1, [], state)
    assert store.state(1) == state


@pytest.mark.fault(1)
def test_a_rank_that_cannot_write_fails_the_save_on_every_rank(tmp_path, monkeypatch):
    save_step(tmp_path, 1)

    def program(peers):
        store = CheckpointStore(tmp_path, peers)
        if peers.rank == 1:
            monkeypatch.setattr(store.folders, "write_rank", _no_space)
        return save(store, 2, peers)

    for result in run_ranks(3, program):
        assert isinstance(result, UserError)
        assert "step 2" in str(result)
        assert "rank 1: No space left on device: rank_00001" in str(result)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["LATEST", "step_00000001"]
    assert run_ranks(3, lambda peers: save(CheckpointStore(tmp_path, peers), 2, peers)) == [True] * 3


def _no_space(*_):
    raise OSError(28, "No space left on device", "rank_00001")


def test_a_bug_on_one_rank_keeps_its_type_and_ends_the_others(tmp_path):
    def program(peers):
        fragments = fragments_of(whole_tensors(1), peers.rank, 2)
        if peers.rank == 1:
            fragments.append(fragments[0])  # the same range twice
        return CheckpointStore(tmp_path, peers).save(1, fragments, {})

    first, second = run_ranks(2, program)
    assert isinstance(first, UserError)
    assert "rank 1: AssertionError" in str(first)
    assert isinstance(second, AssertionError)
    assert CheckpointStore(tmp_path).steps() == []


def test_commit_refuses_a_rank_file_that_is_not_what_was_written(tmp_path):
    folders = CheckpointStore(tmp_path).folders
    folders.begin(1)
    entry = folders.write_rank(1, 0, fragments_of(whole_tensors(1), 0, 1))
    path = folders.saving(1) / entry.name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rank_00000.*the manifest says"):
        folders.commit(1, [entry], {})
    assert folders.steps() == []


def test_retention_keeps_the_last_the_milestones_and_the_verified_one(tmp_path):
    for step in range(1, 11):
        save_step(tmp_path, step, world_size=1)
    store = CheckpointStore(tmp_path)
    store.verify(2)
    store.verify(1)  # as a distillation verifies the older step that holds its teacher
    assert store.purge(2, 5) == [1, 3, 4, 6, 7, 8]
    assert store.steps() == [2, 5, 9, 10]
    assert CheckpointStore(tmp_path).purge(keep_last=1) == [2, 5, 9]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["LATEST", "step_00000010"]


def test_only_rank_0_purges(tmp_path):
    for step in (1, 2):
        save_step(tmp_path, step)
    purged = run_ranks(2, lambda peers: CheckpointStore(tmp_path, peers).purge(keep_last=1))
    assert purged == [[1], []]


@pytest.mark.fault(31)
def test_a_reader_keeps_reading_a_step_that_is_purged_meanwhile(tmp_path):
    """FAULTS 31: the exporter holds the mapped files, the trainer deletes them."""
    for step in (1, 2):
        save_step(tmp_path, step)
    values = CheckpointStore(tmp_path).read_full(1, "ema")
    CheckpointStore(tmp_path).purge(keep_last=1)
    assert all(
        torch.equal(values[name], tensor)
        for (kind, name), tensor in whole_tensors(1).items()
        if kind == "ema"
    )
    with pytest.raises(UserError, match=r"No such file.*\[2\]"):
        CheckpointStore(tmp_path).read_full(1, "ema")


@pytest.mark.fault(7)
def test_disk_full_keeps_the_old_steps(tmp_path):
    """FAULTS 7, with a limit on the file size in a real process."""
    save_step(tmp_path, 1)

    def save_large():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        store = CheckpointStore(tmp_path)
        values = torch.zeros(1 << 19)
        try:
            store.save(2, [("weight", Fragment("w", TensorSlice.whole((1 << 19,)), 0, values))], {"step": 2})
        except UserError as error:
            message = str(error)
        save(store, 3)  # the same process goes on and saves the next, smaller one
        return message

    status, message = in_child(save_large)
    assert status == 0
    assert "step 2" in message
    assert "File too large" in message
    store = CheckpointStore(tmp_path)
    assert store.steps() == [1, 3]
    assert_step_is_good(store, 1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["LATEST", "step_00000001", "step_00000003"]


@pytest.mark.fault(8)
def test_read_only_folder_is_refused_at_the_start():
    """FAULTS 8; root may write anywhere, so the child becomes nobody."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)

        def start():
            if os.geteuid() == 0:
                os.setuid(65534)
            CheckpointStore(Path(folder) / "run").recover()

        status, result = in_child(start)
    assert status == 0
    assert isinstance(result, UserError)
    assert "Permission denied" in str(result)


def test_reading_imports_no_training_framework(tmp_path):
    save_step(tmp_path, 1)
    program = (
        "import sys; from pgm_scale.checkpoint import CheckpointStore; store = CheckpointStore(sys.argv[1]);"
        "store.read_full(store.newest_verified(repair=False), 'ema');"
        "print([m for m in ('deepspeed', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_manifest_is_readable_json(tmp_path):
    save_step(tmp_path, 1)
    document = json.loads((step_folder(tmp_path, 1) / "manifest.json").read_bytes())
    assert [entry["name"] for entry in document["checkpoint"]["files"]] == [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
        "state.json",
    ]
