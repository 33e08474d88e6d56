"""Real ranks that were not given the same run, two runs in one folder, signals at one rank of two."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pgm_scale.checkpoint.fragments import KINDS
from pgm_scale.checkpoint.store import CheckpointStore
from tests.faults.process_runs import (
    ENDLESS,
    config_file,
    ends,
    records,
    saved,
    start,
    start_ranks,
    steps,
    wait_for_step,
)
from tests.tiny_data import write_tiny_data, write_tiny_split

TWO_RANKS: dict[str, Any] = {"parallel": {"timeout_s": 30}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.fault(41)
def test_ranks_of_different_runs_are_refused_with_the_differences(data: Path, tmp_path: Path) -> None:
    """Each would train on, and what they save would be of no run."""
    other = write_tiny_split(tmp_path / "other", 100, 7, "train")
    path = config_file(data, tmp_path / "run", **TWO_RANKS)
    words = ["train", path]
    codes, said = ends(
        start_ranks(
            [words, [*words, "optimizer.learning_rate=0.5", f"data.train={other}", "training.seed=3"]]
        )
    )
    assert codes == [2, 2]
    for text in said:
        first, *differences = text.splitlines()
        assert "the ranks were not given the same run" in first
        assert differences[:2] == [
            "  optimizer.learning_rate: 0.5 on rank 1, 0.01 on rank 0",
            differences[1],
        ]
        assert any("the training data: " in line for line in differences)
        assert any("training.seed: 3 on rank 1" in line for line in differences)
    assert saved(tmp_path / "run") == steps(tmp_path / "run") == []


@pytest.mark.fault(42)
def test_a_run_folder_that_the_nodes_do_not_share_is_refused(data: Path, tmp_path: Path) -> None:
    """Each node's own disk, say: half of every checkpoint would be missing."""
    run = tmp_path / "run"
    words = ["train", config_file(data, run, parallel={"timeout_s": 6})]
    codes, said = ends(start_ranks([words, [*words, f"folder={tmp_path / 'elsewhere'}"]]))
    assert codes == [2, 2]
    assert all(f"{tmp_path / 'elsewhere'} is not the run folder of rank 0" in text for text in said)
    assert saved(run) == []


@pytest.mark.fault(6)
def test_the_same_command_twice_and_after_a_kill(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", config_file(data, run, **ENDLESS), "checkpoint.interval_steps=5"]
    first = start(words)
    wait_for_step(run, 12, first)
    codes, (said,) = ends([start(words)])
    assert codes == [2]
    assert f"pid {first.pid}, job none" in said.splitlines()[-1]
    assert "is in use by another run" in said
    assert first.poll() is None  # and has not noticed
    first.kill()
    first.wait()
    assert (run / "run.lock").exists()
    last = saved(run)[-1]
    codes, (said,) = ends([start([*words, f"training.steps={last + 2}"])])
    assert codes == [0]
    assert "recovered the run lock of a dead process" in said
    assert f"resumed from the checkpoint of step {last}" in said
    assert steps(run) == list(range(1, last + 3))


def shared_memory(process: subprocess.Popen) -> list[str]:
    """What it maps of /dev/shm, and would leave there when it is killed."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return [line for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")]


@pytest.mark.fault(10)
@pytest.mark.fault(12)
@pytest.mark.fault(29)
def test_signals_at_one_rank_are_one_save_of_all(data: Path, tmp_path: Path) -> None:
    """SIGTERM to rank 1, at once again, and USR2 to rank 0; it goes on as if nothing had been."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    words = ["train", config_file(data, run, **ENDLESS, **TWO_RANKS)]
    ranks = start_ranks([words, words])
    wait_for_step(run, 3, *ranks)
    assert not any(map(shared_memory, ranks))
    ranks[1].send_signal(signal.SIGTERM)
    ranks[1].send_signal(signal.SIGTERM)
    ranks[0].send_signal(signal.SIGUSR2)
    codes, said = ends(ranks)
    assert codes == [75, 75], said
    (stopped,) = saved(run)
    assert all(f"stopped by a signal after step {stopped}" in text for text in said)
    steps_in_all = f"training.steps={stopped + 2}"
    assert ends(start_ranks([[*words, steps_in_all]] * 2))[0] == [0, 0]
    assert ends(start_ranks([[*words, steps_in_all, f"folder={straight}"]] * 2))[0] == [0, 0]
    assert [(r["step"], r["loss"]) for r in records(run)] == [
        (r["step"], r["loss"]) for r in records(straight)
    ]
    for kind in KINDS:
        ours, theirs = (CheckpointStore(folder).read_full(stopped + 2, kind) for folder in (run, straight))
        assert all(ours[name].equal(theirs[name]) for name in theirs)
