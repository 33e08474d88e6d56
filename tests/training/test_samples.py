"""Samples beside a validation: written by the first rank, and a failure of it heard by all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pgm_scale.checkpoint.peers import ALONE, Peers
from pgm_scale.errors import UserError
from pgm_scale.run_folder import RunFolder, load_run
from pgm_scale.training.samples import write_validation_samples
from tests.sampling.image_runs import MODELS, write_image_run

PATH = Path("samples", "step_00000012.png")


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_image_run(tmp_path / "run", request.param)


def write(folder: Path, peers: Peers) -> None:
    run = load_run(folder)
    write_validation_samples(
        run.model,
        RunFolder(folder).config(),
        RunFolder(folder).identity(),
        RunFolder(folder),
        12,
        torch.device("cpu"),
        peers,
    )


def test_a_grid_of_the_classes_in_turn(folder: Path) -> None:
    write(folder, ALONE)
    assert Image.open(folder / PATH).size == (64, 64)


def test_another_rank_writes_nothing_and_hears_of_a_failure(folder: Path) -> None:
    def gathered(failure: str | None) -> Any:
        return lambda own: [(None, failure), own]

    write(folder, Peers(1, 2, gathered(None)))
    assert not (folder / PATH).exists()
    with pytest.raises(UserError, match="rank 0: no space"):
        write(folder, Peers(1, 2, gathered("no space")))


def test_what_cannot_be_written_ends_no_training(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "vq.safetensors").unlink()
    write(folder, ALONE)
    assert "vq.safetensors" in caplog.text
    assert "training goes on" in caplog.text
    assert not (folder / PATH).exists()
