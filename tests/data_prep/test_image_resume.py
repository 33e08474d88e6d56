"""Preparations of images that are killed, or shared out among other numbers of workers, end with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.images import prepare_images, read_rejected
from pgm_scale.vq_tokenizer import VQTokenizer
from tests.data_prep.conftest import tree
from tests.data_prep.pictures import CARELESS_BAD, write_careless_folder, write_folder
from tests.data_prep.small_image_run import options, source


def start(folder: Path, output: Path, shard_format: str, workers: int) -> subprocess.Popen:
    arguments = [str(folder), str(output), shard_format, str(workers)]
    command = [sys.executable, "-m", "tests.data_prep.small_image_run", *arguments]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("shard_format", ["tar", "mds"])
def test_kill_9_and_resume(tmp_path: Path, no_processes: None, shard_format: str) -> None:
    """Killed at three moments and finished by another number of workers: the bytes of a run in this process."""
    folder = write_folder(tmp_path / "in", 70)
    write_careless_folder(folder)
    whole, output = tmp_path / "whole", tmp_path / "out"
    prepare_images(source(folder), options(whole, format=shard_format))
    assert len(read_rejected(whole)) == len(CARELESS_BAD)
    generator = random.Random(os.urandom(8))
    killed = 0
    for moment in (".prepare/plan.json", ".prepare/units/*3.npz", ".prepare/train/*"):
        process = start(folder, output, shard_format, 2)
        while process.poll() is None and not list(output.glob(moment)):
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.03))
        if process.poll() is None:
            killed += 1
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert killed
    assert start(folder, output, shard_format, 1).wait() == 0
    assert tree(output) == tree(whole)


def test_the_number_of_workers_changes_no_code(
    tmp_path: Path, no_processes: None, tokenizer: tuple[Path, VQTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, newest unit first, and by two real ones."""
    folder = write_folder(tmp_path / "in", 70)
    settings = {"size": 16, "augmentation": "flip", "vq_path": tokenizer[0], "batch": 7}
    prepare_images(source(folder), options(tmp_path / "here", **settings))
    monkeypatch.undo()
    prepare_images(source(folder), options(tmp_path / "two", **settings, workers=2))
    assert tree(tmp_path / "here") == tree(tmp_path / "two")
