"""The step that ranks agree on, and places in the work folder that cannot be had."""

import json
import threading
from pathlib import Path

import pytest

from pgm_scale.errors import HungRankError, UserError
from pgm_scale.evaluation.images.work import chosen_step, only_process
from pgm_scale.parallel.launch import Launch
from pgm_scale.run_folder import RunFolder
from tests.evaluation.images.tiny_run import TinyImages, save_step, write_tiny_images


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyImages:
    tiny = write_tiny_images(tmp_path_factory.mktemp("images"))
    save_step(Path(tiny.run), 2)
    return tiny


def _rank(rank: int) -> Launch:
    return Launch("torchrun", rank, 2, rank, "127.0.0.1", 1)


def test_other_ranks_wait_for_what_rank_0_chooses(tiny: TinyImages, tmp_path: Path) -> None:
    with pytest.raises(HungRankError, match="rank 0 has not chosen a step for 0 s"):
        chosen_step(tiny.run, tmp_path, _rank(1), 0.3)
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(chosen_step(tiny.run, tmp_path, _rank(1), 60)))
    other.start()
    assert chosen_step(tiny.run, tmp_path, _rank(0), 60) == 2
    other.join()
    assert found == [2]


def test_a_choice_of_an_older_step_stands(tiny: TinyImages, tmp_path: Path) -> None:
    path = tmp_path / f"step-{RunFolder(tiny.run).identity().run_id}.json"
    path.write_text(json.dumps({"step": 1}))
    assert [chosen_step(tiny.run, tmp_path, _rank(rank), 60) for rank in (0, 1)] == [1, 1]
    path.write_text("{")
    with pytest.raises(UserError, match=r"step-\w+\.json cannot be read .*; delete it, or name a step"):
        chosen_step(tiny.run, tmp_path, _rank(0), 60)


def test_a_run_without_checkpoints_is_told_by_all_ranks(tiny: TinyImages, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_bytes(RunFolder(tiny.run).identity_path.read_bytes())
    for rank in (0, 1):
        with pytest.raises(UserError, match="run has no checkpoint yet; train it first"):
            chosen_step(str(run), tmp_path, _rank(rank), 60)


def test_a_work_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(
            UserError, match=r"--work: cannot write .*file/work.* \(Not a directory\); choose another"
        ),
        only_process(tmp_path / "file" / "work", _rank(0)),
    ):
        pass
