"""Faults of the files of a run, as the person sees them who runs `pgm-scale train` again, or is training."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pgm_scale import config as configuration
from pgm_scale.checkpoint import CheckpointStore
from tests.checkpoint.support import in_child
from tests.faults.commands import Outcome, command, nothing
from tests.tiny_data import tiny_config, write_tiny_data

STEPS, INTERVAL = 4, 2


class Run:
    """A run of four steps with two checkpoints, and the command that goes on with it."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "run"
        self.checkpoints = self.folder / "checkpoints"
        data = write_tiny_data(root / "data") if not (root / "data").exists() else root / "data"
        config = tiny_config(
            data,
            self.folder,
            training={"steps": STEPS},
            checkpoint={"interval_steps": INTERVAL},
            validation={"samples": 1, "interval_steps": INTERVAL},
        )
        (root / "config.yaml").write_text(configuration.to_yaml(config))

    def train(self, *overrides: str, before: Callable[[], None] = nothing) -> Outcome:
        return command(self.root / "said", "train", self.root / "config.yaml", *overrides, before=before)

    def go_on(self, *overrides: str, before: Callable[[], None] = nothing) -> Outcome:
        return self.train(f"training.steps={STEPS + INTERVAL}", *overrides, before=before)

    def step(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def records(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    outcome = Run(root).train()
    assert outcome.exit_code == 0, outcome.said
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return Run(tmp_path)


@pytest.mark.fault(33)
@pytest.mark.fault(5)
def test_checkpoints_that_are_gone_are_no_new_run(run: Run) -> None:
    shutil.rmtree(run.checkpoints)
    run.go_on().assert_refused("has had checkpoints, but none is usable")
    assert not any(run.checkpoints.glob("step_*"))
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(run.root / "disk that is not mounted")
    run.go_on().assert_refused(f"{run.checkpoints} is no folder, or a link to one that is gone")


@pytest.mark.fault(33)
def test_a_run_whose_identity_is_gone_is_not_described_anew(run: Run) -> None:
    """Else it would go on with any seed, model and data that somebody has given now."""
    run_id = json.loads((run.folder / "run.json").read_text())["run_id"]
    (run.folder / "run.json").unlink()
    run.go_on("training.seed=7").assert_refused(
        f"run.json is missing, but the run has had checkpoints (run_id {run_id})"
    )
    assert not (run.folder / "run.json").exists()


@pytest.mark.fault(32)
@pytest.mark.fault(4)
def test_a_checkpoint_of_another_run_is_not_gone_on_from(run: Run, trained: Path) -> None:
    """It is whole, of the same model, and newer."""
    other = Run(trained)
    other.folder = run.root / "other"
    other_checkpoints = other.folder / "checkpoints"
    outcome = run.go_on(f"folder={other.folder}")
    assert outcome.exit_code == 0, outcome.said
    shutil.copytree(other_checkpoints / run.step(6).name, run.step(6))
    outcome = run.go_on()
    assert outcome.exit_code == 0, outcome.said
    assert "checkpoint step_00000006 is bad: state.json: belongs to another run; moved to" in outcome.said
    assert "resumed from the checkpoint of step 4" in outcome.said
    # And with the other's run.json, which makes all the good ones foreign: nothing is moved.
    before = sorted(os.listdir(run.checkpoints))
    shutil.copy(other.folder / "run.json", run.folder / "run.json")
    shutil.rmtree(run.checkpoints / "quarantine")
    run.go_on().assert_refused("restore run.json, or move them to their own run folder")
    assert sorted(os.listdir(run.checkpoints)) == [name for name in before if name != "quarantine"]


@pytest.mark.fault(3)
def test_a_flipped_bit_falls_back_or_is_refused_by_strict(run: Run) -> None:
    path = run.step(4) / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-99] ^= 4
    path.write_bytes(data)
    bad = "checkpoint step_00000004 is bad: rank_00000.safetensors: SHA-256 differs from the manifest"
    strict = command(run.root / "said", "train", "--strict", run.root / "config.yaml", "training.steps=6")
    strict.assert_refused(bad)
    assert sorted(os.listdir(run.checkpoints)) == ["LATEST", "step_00000002", "step_00000004"]
    outcome = run.go_on()
    assert outcome.exit_code == 0, outcome.said
    assert bad in outcome.said
    assert "resumed from the checkpoint of step 2" in outcome.said
    assert run.records() == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault(37)
def test_strange_names_are_left_alone_and_count_for_nothing(run: Run) -> None:
    """A hidden backup, a number in another spelling, a copy under the name of a step that is still to come."""
    shutil.copytree(run.step(4), run.checkpoints / ".step_00000004.backup")
    shutil.copytree(run.step(4), run.checkpoints / "step_000000099")
    copied = threading.Thread(target=_copy_when, args=(run.step(8), run.step(4), run.step(10)))
    copied.start()
    outcome = run.train("training.steps=14", "checkpoint.keep_last=2", "validation.samples=0")
    copied.join()
    assert outcome.exit_code == 0, outcome.said
    found = {path.name for path in run.checkpoints.iterdir()} - {"LATEST", "quarantine"}
    # Step 4, from which the session has resumed, is kept as the last that was read.
    assert found == {
        ".step_00000004.backup",
        "step_000000099",
        *(run.step(step).name for step in (4, 12, 14)),
    }
    for step in (12, 14):
        CheckpointStore(run.folder).verify(step)


def _copy_when(seen: Path, source: Path, target: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not seen.exists() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    whole = (
        target.parent.parent / "copied"
    )  # appears at once, so that it is always before the step or after it
    shutil.copytree(source, whole)
    if not target.exists():
        whole.rename(target)


@pytest.mark.fault(7)
@pytest.mark.fault(9)
def test_a_file_that_may_not_grow_ends_the_save_in_the_background(run: Run) -> None:
    """The thread that writes hits the limit of this process; seen one step later, by all."""
    outcome = run.go_on("training.steps=40", before=_no_large_files)
    outcome.assert_refused("checkpoint of step 6 not saved")
    assert "File too large" in outcome.said
    assert "earlier checkpoints are intact" in outcome.said
    assert sorted(os.listdir(run.checkpoints)) == ["LATEST", "step_00000002", "step_00000004"]
    assert (run.checkpoints / "LATEST").read_text() == "step_00000004\n"
    assert run.records()[-1] <= 8, "seen when the next step has ended at the latest"
    outcome = run.go_on()
    assert "resumed from the checkpoint of step 4" in outcome.said
    assert outcome.exit_code == 0


def _no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


@pytest.mark.fault(35)
@pytest.mark.fault(7)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs; RLIMIT_FSIZE is tried by the test above")
@pytest.mark.parametrize("size", ["size=36k", "size=300k", "nr_inodes=13"])
def test_a_full_disk_ends_the_run_at_a_save_and_nothing_else_does(tmp_path: Path, size: str) -> None:
    """Logs, heartbeat, samples, LATEST: whatever is full first is said, and training goes on to the save."""
    run = Run(tmp_path)
    run.folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(run.folder)], check=True)
    try:
        outcome = run.train("training.steps=60", "checkpoint.keep_last=50")
        outcome.assert_refused("not saved in")
        assert "No space left on device" in outcome.said
        committed = CheckpointStore(run.folder).steps()
        for step in committed:
            CheckpointStore(run.folder).verify(step)
        lines = (run.folder / "metrics.jsonl").read_bytes()
        assert lines == b"" or lines.endswith(b"\n")
        assert not list(run.folder.rglob("*.saving"))
        subprocess.run(["mount", "-o", "remount,size=20m,nr_inodes=1000", str(run.folder)], check=True)
        outcome = run.train("training.steps=12")
        assert outcome.exit_code == 0, outcome.said
        assert ("resumed from the checkpoint" in outcome.said) == bool(committed)
        assert CheckpointStore(run.folder).newest_verified() == 12
    finally:
        subprocess.run(["umount", str(run.folder)], check=True)


@pytest.mark.fault(39)
def test_a_run_folder_that_is_moved_is_not_written_to_again(run: Run) -> None:
    elsewhere = run.root / "elsewhere"
    mover = threading.Thread(target=_rename_when, args=(run.step(8), run.folder, elsewhere))
    mover.start()
    outcome = run.train("training.steps=4000", "validation.samples=0", "validation.interval_steps=4000")
    mover.join()
    outcome.assert_refused("has lost")
    assert not run.folder.exists()
    newest = CheckpointStore(elsewhere).newest_verified()
    assert newest is not None
    assert newest >= 8
    outcome = run.train(f"folder={elsewhere}", f"training.steps={newest + 2}")
    assert outcome.exit_code == 0, outcome.said
    assert f"resumed from the checkpoint of step {newest}" in outcome.said


def _rename_when(seen: Path, source: Path, target: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not seen.exists() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    os.rename(source, target)


def _as_nobody(action: Callable[[], object]) -> object:
    """What it raises, tried by a user who is not root."""
    if os.geteuid() == 0:
        os.setuid(65534)
    return action()


def _resume(folder: Path) -> int | None:
    store = CheckpointStore(folder)
    store.recover()
    return store.newest_verified()


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "hidden", ["step_00000004", "step_00000004/manifest.json", "step_00000004/state.json"]
)
def test_what_cannot_be_read_now_is_not_taken_for_bad(hidden: str) -> None:
    """No permission to read the newest step: going on from an older one would give up a good checkpoint."""
    import tempfile

    from tests.checkpoint.support import save_step

    with tempfile.TemporaryDirectory() as place:
        for step in (2, 4):
            save_step(Path(place), step)
        for path in [Path(place), *Path(place).rglob("*")]:
            os.chown(path, 65534 if os.geteuid() == 0 else -1, -1)
        target = Path(place) / "checkpoints" / hidden
        os.chmod(target, 0)
        _, error = in_child(functools.partial(_as_nobody, functools.partial(_resume, Path(place))))
        os.chmod(target, 0o700)
        assert "Permission denied" in str(error)
        assert hidden.split("/")[0] in str(error)
        assert sorted(os.listdir(Path(place) / "checkpoints")) == ["LATEST", "step_00000002", "step_00000004"]
        assert _resume(Path(place)) == 4


@pytest.mark.fault(8)
def test_checkpoints_that_cannot_be_written_are_refused_before_step_1() -> None:
    """The run folder can be, and they cannot: on another disk, or of another user."""
    import tempfile

    from tests.checkpoint.support import save_step

    with tempfile.TemporaryDirectory() as place:
        save_step(Path(place), 2)
        os.chmod(place, 0o777)
        os.chmod(Path(place) / "checkpoints", 0o555)
        _, error = in_child(functools.partial(_as_nobody, functools.partial(_resume, Path(place))))
        assert "Permission denied" in str(error)
