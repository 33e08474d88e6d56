"""A preparation that is stopped anywhere and run again gives the bytes of one that was not."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from data_prep import pipeline, units
from data_prep.sources import UnitSize
from data_prep.text import prepare
from data_prep.tokenizers import train_bpe
from pgm_scale.data.writers import write_shard
from pgm_scale.errors import UserError
from tests.data_prep.conftest import tree
from tests.data_prep.small_run import SmallUnits, options, source


class Crash(BaseException):
    """Not an Exception: nobody may catch it, as nobody catches a kill."""


class Crasher:
    """Ends the run at the n-th change of a name in the file system, which is where a kill makes a difference."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls_left = -1
        self.calls = 0
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Callable) -> Callable:
        def counted(*arguments, **named):
            self.calls += 1
            if self.calls_left == 0:
                raise Crash
            self.calls_left -= 1
            return function(*arguments, **named)

        return counted


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("shard_format", ["tar", "mds"])
def test_a_crash_at_every_point(text_folder, tmp_path, monkeypatch, shard_format):
    """Twice in a run, the second time while it recovers; at every point with tar, at some with the slower mds."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # only a power cut makes a difference there
    monkeypatch.setattr(SmallUnits, "unit_size", UnitSize(documents=40))
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(["some text"], 257))
    settings = {"format": shard_format, "rows_per_shard": 3000, "tokenizer": str(tmp_path / "tokenizer.json")}
    whole = tmp_path / "whole"
    crasher = Crasher(monkeypatch)
    manifests = prepare(source(text_folder), options(whole, **settings))
    points = crasher.calls
    assert points > 25
    assert len(manifests[0].shards) > 1
    for point in range(0, points, 1 if shard_format == "tar" else 5):
        output = tmp_path / str(point)
        for calls_left in (point, 7):
            crasher.calls_left = calls_left
            with contextlib.suppress(Crash):
                prepare(source(text_folder), options(output, **settings))
        crasher.calls_left = -1
        prepare(source(text_folder), options(output, **settings))
        assert tree(output) == tree(whole), f"stopped at point {point} of {points}"


@pytest.mark.usefixtures("no_processes")
def test_an_unfinished_run_is_not_continued_with_other_inputs(text_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        crasher = Crasher(context)
        crasher.calls_left = 20
        with pytest.raises(Crash):
            prepare(source(text_folder), options(tmp_path / "out"))
    with pytest.raises(
        UserError, match="unfinished preparation: length_tokens was 16, now 32; choose another"
    ):
        prepare(source(text_folder), options(tmp_path / "out", length_tokens=32))
    (text_folder / "new.txt").write_text("new")
    with pytest.raises(UserError, match=r"input\.files was 120, now 121"):
        prepare(source(text_folder), options(tmp_path / "out"))


def start(text_folder: Path, output: Path, shard_format: str, workers: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "tests.data_prep.small_run",
        text_folder,
        output,
        shard_format,
        str(workers),
    ]
    return subprocess.Popen(list(map(str, command)), cwd=Path(__file__).parents[2])


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_the_number_of_workers_changes_no_byte(text_folder, tmp_path):
    for workers in (1, 2):
        assert start(text_folder, tmp_path / str(workers), "tar", workers).wait() == 0
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


@pytest.mark.fault(51)
@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    ("shard_format", "workers", "moments"),
    [
        (
            "tar",
            2,
            [".prepare/plan.json", ".prepare/units/*4.npz", ".prepare/units/*9.npz", ".prepare/train/*"],
        ),
        ("mds", 1, [".prepare/train/*"]),
    ],
)
def test_kill_9_of_real_processes(text_folder, tmp_path, shard_format, workers, moments):
    whole, output = tmp_path / "whole", tmp_path / "out"
    prepare(source(text_folder), options(whole, format=shard_format))
    generator = random.Random(os.urandom(8))
    killed = 0
    for moment in moments:
        process = start(text_folder, output, shard_format, workers)
        while process.poll() is None and not list(output.glob(moment)):
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.03))
        if process.poll() is None:
            killed += 1
            children = children_of(process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait()
            deadline = time.monotonic() + 20
            while any(map(is_running, children)):  # no worker outlives its parent
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert killed
    assert start(text_folder, output, shard_format, workers).wait() == 0
    assert tree(output) == tree(whole)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("no_processes")
def test_unit_files_of_the_version_before_images_are_taken(text_folder, tmp_path, monkeypatch):
    """They list nothing that was left out; and are not encoded again."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    prepare(source(text_folder), options(whole))
    with monkeypatch.context() as context:
        context.setattr(pipeline, "_make_shards", raise_crash)
        with pytest.raises(Crash):
            prepare(source(text_folder), options(output))
    files = sorted((output / ".prepare" / "units").iterdir())
    assert len(files) > 10
    for file in files:
        with np.load(file) as content:
            older = {name: content[name] for name in content.files if name != "rejected"}
        np.savez(file, **older)
    monkeypatch.setattr(units, "write_unit", raise_crash)
    prepare(source(text_folder), options(output))
    assert tree(output) == tree(whole)


def raise_crash(*arguments) -> None:
    raise Crash


@pytest.mark.usefixtures("no_processes")
def test_every_pass_over_the_text_has_a_bar(text_folder, tmp_path, monkeypatch):
    progress = Progress(disable=True)
    monkeypatch.setattr(pipeline, "_progress", lambda shown: progress)
    prepare(source(text_folder), options(tmp_path / "out"))
    bars = [(task.description, task.completed, task.total) for task in progress.tasks]
    assert {("checking the input files", 120, 120), ("surveying the input", 120, 120)} < set(bars)


def test_a_shard_is_filled_from_parts_of_units(tmp_path):
    """Rows of the middle of one unit to the middle of another, in order; then as it is."""
    tokens_RL = np.arange(60, dtype=np.uint16).reshape(10, 6)
    lengths_R, labels_R = np.arange(1, 11) % 6 + 1, np.arange(10)
    for number, rows in enumerate((slice(0, 3), slice(3, 7), slice(7, 10))):
        unit = units.UnitRows(1, tokens_RL[rows], lengths_R[rows], labels_R[rows])
        units.write_unit(unit, tmp_path / f"{number}.npz")
    parts = ((tmp_path / "0.npz", 2, 3), (tmp_path / "1.npz", 0, 4), (tmp_path / "2.npz", 0, 2))
    shard = units.make_shard(units.ShardTask(tmp_path, "ours.mds", "mds", parts))
    expected = write_shard(tmp_path, "whole.mds", "mds", tokens_RL[2:9], lengths_R[2:9], labels_R[2:9])
    assert (shard.rows, shard.bytes, shard.sha256) == (7, expected.bytes, expected.sha256)
    task = units.ShardTask(tmp_path, "ours.mds", "mds", parts)
    assert units.make_shard(task) == shard  # which is there already
