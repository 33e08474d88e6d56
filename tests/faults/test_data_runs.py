"""Faults of the data, through the command line: what a user sees, and that it ends."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pgm_scale import config as configuration
from pgm_scale.data import DatasetManifest
from pgm_scale.data.batch import ShardRows
from pgm_scale.data.mds import write_mds
from pgm_scale.data.readers import read_shard
from pgm_scale.files import sha256_file
from tests.data_prep.conftest import random_text, tree
from tests.tiny_data import tiny_config, write_tiny_data

COMMAND = [sys.executable, "-m", "pgm_scale.cli"]
PREPARE = ["--tokenizer", "train:bpe:300", "--length", "16", "--rows-per-shard", "500", "--quiet"]
ROOT = Path(__file__).parents[2]


def run(*arguments: object, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Exit code and what is on stderr; a command that hangs fails the test."""
    finished = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=before,
        cwd=ROOT,
    )
    assert "Traceback" not in finished.stderr
    return finished.returncode, finished.stderr


def config_file(data: Path, folder: Path, **changes: object) -> Path:
    path = folder.with_suffix(".yaml")
    path.write_text(configuration.to_yaml(tiny_config(data, folder, **changes)))
    return path


@pytest.mark.fault(52)
@pytest.mark.parametrize("name", ["dataset.json", "tokenizer.json"])
def test_training_on_a_fifo_ends_in_one_line(tmp_path: Path, name: str) -> None:
    data = write_tiny_data(tmp_path / "data")
    (data / "train" / name).unlink()
    os.mkfifo(data / "train" / name)
    code, told = run("train", config_file(data, tmp_path / "run"))
    assert code == 2
    assert name in told
    assert "not a plain file" in told


@pytest.mark.fault(56)
def test_a_token_beyond_the_vocabulary_in_a_shard_whose_hash_is_right(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    manifest = DatasetManifest.load(data / "train")
    path = data / "train" / manifest.shards[1].name
    rows = read_shard(path, manifest.shards[1], manifest)
    tokens_RL = rows.tokens_RL.copy()
    tokens_RL[7, 5] = 60_000
    write_mds(path, ShardRows(tokens_RL, rows.valid_lengths_R))
    shard = dataclasses.replace(manifest.shards[1], sha256=sha256_file(path))
    dataclasses.replace(manifest, shards=(manifest.shards[0], shard)).save(data / "train")
    for command in ("train", "doctor"):
        code, told = run(command, config_file(data, tmp_path / command))
        assert code == 2
        assert f"{path}: not the mds shard" in told
        assert "its row 7 has token 60000, the vocabulary ends at 24" in told


@pytest.mark.fault(58)
@pytest.mark.fault(19)
def test_a_shard_that_is_cut_while_it_is_trained_on(tmp_path: Path) -> None:
    """With one shard open at a time, so that each is read again every epoch; then mended, the run goes on."""
    data = write_tiny_data(tmp_path / "data")
    tree_of = tiny_config(data, tmp_path / "run")
    settings = dataclasses.replace(tree_of.data, shuffle_block_shards=1)
    training = dataclasses.replace(tree_of.training, steps=100_000)
    checkpoint = dataclasses.replace(tree_of.checkpoint, interval_steps=2)
    config = dataclasses.replace(tree_of, data=settings, training=training, checkpoint=checkpoint)
    path = tmp_path / "run.yaml"
    path.write_text(configuration.to_yaml(config))
    process = subprocess.Popen(
        [*COMMAND, "train", str(path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline_s = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    shard = data / "train" / "shard-00001.mds"
    whole = shard.read_bytes()
    with open(shard, "r+b") as file:
        file.truncate(300)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert "Traceback" not in told
    assert f"{shard}: corrupt: 300 bytes instead of {len(whole)}" in told
    assert run("train", path)[0] == 2  # on every run
    shard.write_bytes(whole)
    code, told = run("train", path, "training.steps=12")
    assert (code, "resum" in told.lower() or "going on" in told.lower() or "goes on" in told.lower()) == (
        0,
        True,
    ), told


@pytest.mark.fault(55)
@pytest.mark.fault(51)
def test_prepare_without_room_and_beside_another(tmp_path: Path) -> None:
    """At a size limit; then two at once with more of it, one of which is refused; then the bytes are the same."""
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number}.txt").write_text(random_text(number, 600))
    arguments = ["prepare", "text", "--input", tmp_path / "in", *PREPARE, "--workers", "1"]
    assert run(*arguments, "--output", tmp_path / "whole")[0] == 0
    output = tmp_path / "out"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code, told = run(*arguments, "--output", output, before=limited)
    assert code == 2
    assert told.count("\n") == 1
    assert "File too large; make room" in told
    both = [
        subprocess.Popen(
            [*COMMAND, *map(str, arguments), "--output", str(output)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    told_by = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes
    for code, told in zip(codes, told_by, strict=True):
        assert code == 0 or (code == 2 and "another process is preparing here" in told)
    assert tree(output) == tree(tmp_path / "whole")
    shutil.rmtree(output)


@pytest.mark.fault(50)
def test_a_flipped_mask_id_is_not_trained_with(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    path = data / "train" / "dataset.json"
    text = path.read_text()
    assert text.count('"mask_id": 23') == 1
    path.write_text(text.replace('"mask_id": 23', '"mask_id": 22'))
    code, told = run("train", config_file(data, tmp_path / "run"))
    assert code == 2
    assert f"{path}: it is not what was written" in told
    assert not np.any([name.name == "metrics.jsonl" for name in tmp_path.rglob("*")])
