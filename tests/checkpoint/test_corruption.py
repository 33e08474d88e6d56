"""FAULTS 2 to 5: whatever happens to the files, a wrong byte is never loaded."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.checkpoint import CheckpointStore
from pgm_scale.checkpoint.manifest import Manifest
from pgm_scale.errors import UserError
from tests.checkpoint.support import assert_step_is_good, run_ranks, save_step, step_folder

FILES = ["rank_00000.safetensors", "rank_00001.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def run_folder(tmp_path):
    """Steps 1 and 2, by two ranks."""
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    return tmp_path


def flip(path: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= mask
    path.write_bytes(data)


@pytest.mark.fault(3)
@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(FILES), offset=st.integers(0, 100_000), mask=st.integers(1, 255))
def test_any_flipped_byte_is_found_and_the_run_falls_back(name, offset, mask):
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder)
        save_step(run_folder, 1)
        save_step(run_folder, 2)
        flip(step_folder(run_folder, 2) / name, offset, mask)
        store = CheckpointStore(run_folder)
        assert store.newest_verified() == 1
        assert store.steps() == [1]
        [quarantined] = os.listdir(run_folder / "checkpoints" / "quarantine")
        assert quarantined.startswith(f"step_00000002-{name}")


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=200) | st.text(alphabet='{}[]":,0189aeinrstul\\ ', max_size=200).map(str.encode)
)
def test_no_bytes_make_the_manifest_parser_fall(data):
    with pytest.raises(ValueError):
        Manifest.from_bytes(data)


def truncate(folder):
    os.truncate(folder / FILES[0], 100)


def empty(folder):
    os.truncate(folder / FILES[1], 0)


def remove(folder):
    (folder / FILES[1]).unlink()


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


def remove_state(folder):
    (folder / "state.json").unlink()


def swap(folder):
    first, second = (folder / name for name in FILES[:2])
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def grow(folder):
    with open(folder / FILES[0], "ab") as file:
        file.write(b"\0")


def of_another_step(folder):
    shutil.copy(folder.with_name("step_00000001") / FILES[0], folder / FILES[0])


def all_of_another_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_00000001"), folder)


def foreign(folder):
    (folder / FILES[0]).write_bytes(b"\x80\x04cos\nsystem\n")


def extra_rank(folder):
    shutil.copy(folder / FILES[1], folder / "rank_00002.safetensors")


def folder_for_file(folder):
    (folder / FILES[1]).unlink()
    (folder / FILES[1]).mkdir()


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "rank_00000.safetensors: 100 bytes, the manifest says"),
        (empty, "rank_00001.safetensors: 0 bytes"),
        (remove, "rank_00001.safetensors: missing"),
        (remove_manifest, "manifest.json: No such file"),
        (remove_state, "state.json: missing"),
        (swap, "rank_00000.safetensors: "),
        (grow, "rank_00000.safetensors: "),
        (of_another_step, "rank_00000.safetensors: SHA-256 differs"),
        (all_of_another_step, "manifest.json: belongs to step 1"),
        (foreign, "rank_00000.safetensors: "),
        (extra_rank, "rank_00002.safetensors: not in the manifest"),
        (folder_for_file, "rank_00001.safetensors: "),
    ],
)
def test_damage_is_named_and_falls_back_or_refuses(run_folder, caplog, damage, reason):
    damage(step_folder(run_folder, 2))
    store = CheckpointStore(run_folder)
    with pytest.raises(UserError) as caught:
        store.newest_verified(strict=True)
    assert "step_00000002" in str(caught.value)
    assert reason in str(caught.value)
    assert store.steps() == [1, 2], "strict moves nothing"
    assert store.newest_verified() == 1
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "step_00000002" in line
    assert reason in line
    assert_step_is_good(store, 1)
    assert (run_folder / "checkpoints" / "LATEST").read_text() == "step_00000001\n"


@pytest.mark.fault(3)
def test_all_ranks_agree_on_the_fallback(run_folder):
    flip(step_folder(run_folder, 2) / FILES[1], 300)  # in the share of one rank only
    assert run_ranks(3, lambda peers: CheckpointStore(run_folder, peers).newest_verified()) == [1, 1, 1]


@pytest.mark.fault(5)
@pytest.mark.parametrize("strict", [False, True])
def test_every_step_bad_refuses_to_start_from_scratch_on_every_try(run_folder, strict):
    for step in (1, 2):
        flip(step_folder(run_folder, step) / FILES[step - 1], 40)
    for _ in range(2):
        results = run_ranks(2, lambda peers: CheckpointStore(run_folder, peers).newest_verified(strict))
        for result in results:
            assert isinstance(result, UserError)
            assert "step_00000002" in str(result)


@pytest.mark.fault(5)
def test_deleted_steps_are_not_a_fresh_run(run_folder):
    for step in (1, 2):
        shutil.rmtree(step_folder(run_folder, step))
    with pytest.raises(UserError, match="none is usable"):
        CheckpointStore(run_folder).newest_verified()


@pytest.mark.fault(4)
def test_the_same_step_can_be_quarantined_twice(run_folder):
    for _ in range(2):
        remove(step_folder(run_folder, 2))
        assert CheckpointStore(run_folder).newest_verified() == 1
        save_step(run_folder, 2)
    assert len(os.listdir(run_folder / "checkpoints" / "quarantine")) == 2
    assert CheckpointStore(run_folder).newest_verified() == 2


@pytest.mark.fault(2)
@pytest.mark.parametrize("marker", [None, b"", b"step_00000001\n", b"step_00000009\n", b"\xff\xfe"])
def test_the_marker_is_repaired(run_folder, marker):
    path = run_folder / "checkpoints" / "LATEST"
    path.unlink()
    if marker is not None:
        path.write_bytes(marker)
    assert CheckpointStore(run_folder).newest_verified() == 2
    assert path.read_text() == "step_00000002\n"


@pytest.mark.fault(31)
def test_readers_of_somebody_elses_run_change_nothing(run_folder, caplog):
    flip(step_folder(run_folder, 2) / FILES[0], 9)
    (run_folder / "checkpoints" / ".step_00000003.saving").mkdir()
    before = sorted(path.relative_to(run_folder) for path in run_folder.rglob("*"))
    assert CheckpointStore(run_folder).newest_verified(repair=False) == 1
    assert sorted(path.relative_to(run_folder) for path in run_folder.rglob("*")) == before
    assert "passed over" in caplog.text


@pytest.mark.fault(31)
def test_a_step_purged_while_it_is_verified_is_not_called_bad(run_folder, monkeypatch, caplog):
    store = CheckpointStore(run_folder)
    real = store._problems

    def purged_meanwhile(step):
        if step == 2:
            shutil.rmtree(step_folder(run_folder, 2))
        return real(step)

    monkeypatch.setattr(store, "_problems", purged_meanwhile)
    assert store.newest_verified(repair=False) == 1
    assert caplog.text == ""


def test_other_files_in_a_step_are_nobodys_business(run_folder):
    (step_folder(run_folder, 2) / "notes.txt").write_text("keep this one")
    assert CheckpointStore(run_folder).newest_verified() == 2


def test_verify_names_a_step_that_is_not_there(run_folder):
    with pytest.raises(UserError, match=r"step_00000005 is bad: manifest.json: No such file.*\[1, 2\]"):
        CheckpointStore(run_folder).verify(5)
