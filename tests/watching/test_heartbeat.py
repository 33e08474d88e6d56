"""The heartbeat file: round trip, damage of all kinds in one line, whole at every moment."""

import dataclasses
import json
import os
import threading
from pathlib import Path

import pytest

from pgm_scale.watching.heartbeat import (
    HEARTBEAT_NAME,
    Heartbeat,
    job_name,
    read_heartbeat,
    remove_unfinished,
    replace_file,
)


def heartbeat(**changes: object) -> Heartbeat:
    values = {
        "run": "owt",
        "state": "training",
        "step": 5,
        "total_steps": 9,
        "unix_time_s": 1000.5,
        "started_unix_time_s": 990.0,
        "timeout_s": 600.0,
        "ranks": 2,
        "restarts": 1,
        "host": "node1",
        "pid": 77,
        "loss": 2.5,
    }
    return Heartbeat(**(values | changes))  # type: ignore[arg-type]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for written in (
        heartbeat(),
        heartbeat(state="failed", exit_reason='hung: rank 1 "x"\\', job="12_3", run="Ünïcode\n"),
        heartbeat(mfu=0.41, last_checkpoint_step=3, slowest_rank_ratio=1.02, validation_perplexity=11.0),
    ):
        replace_file(tmp_path / HEARTBEAT_NAME, written.to_bytes())
        assert read_heartbeat(tmp_path) == written
    assert os.listdir(tmp_path) == [HEARTBEAT_NAME]


def test_what_is_not_finite_is_not_known() -> None:
    written = heartbeat(loss=float("nan"), mfu=float("inf"))
    assert Heartbeat.from_bytes(written.to_bytes()) == dataclasses.replace(written, loss=None, mfu=None)


def test_a_newer_version_may_say_more() -> None:
    tree = json.loads(heartbeat().to_bytes()) | {"mood": "good"}
    assert Heartbeat.from_bytes(json.dumps(tree).encode()) == heartbeat()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"{}",
        heartbeat().to_bytes().replace(b"training", b"dancing"),
        heartbeat().to_bytes().replace(b": 5,", b': "five",'),
        heartbeat().to_bytes().replace(b": 5,", b": true,"),
    ],
)
def test_damage_is_told_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / HEARTBEAT_NAME).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_heartbeat(tmp_path)
    assert caught.type is ValueError
    assert "\n" not in str(caught.value)
    assert str(caught.value)


def test_a_missing_one_is_none_and_a_folder_is_damage(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path) is None
    (tmp_path / HEARTBEAT_NAME).mkdir()
    with pytest.raises(ValueError, match="no regular file"):
        read_heartbeat(tmp_path)


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            replace_file(tmp_path / HEARTBEAT_NAME, heartbeat(step=step, host="h" * (step % 999)).to_bytes())

    replace_file(tmp_path / HEARTBEAT_NAME, heartbeat().to_bytes())
    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(200):
            assert read_heartbeat(tmp_path) is not None
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / HEARTBEAT_NAME
    target.mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError):
        replace_file(target, b"x")
    assert os.listdir(tmp_path) == [HEARTBEAT_NAME]


@pytest.mark.fault(72)
def test_what_dead_writers_have_left_is_removed(tmp_path: Path) -> None:
    for name in (
        ".heartbeat.json.12.34.writing",
        ".heartbeat.json.13.35.writing",
        ".metrics.prom.12.34.writing",
    ):
        (tmp_path / name).touch()
    replace_file(tmp_path / HEARTBEAT_NAME, b"x")
    remove_unfinished(tmp_path / HEARTBEAT_NAME)
    assert sorted(os.listdir(tmp_path)) == [".metrics.prom.12.34.writing", HEARTBEAT_NAME]


def test_the_name_of_a_job() -> None:
    assert job_name({}) is None
    assert job_name({"SLURM_JOB_ID": "17"}) == "17"
    array = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_name(array) == "17_2"
