"""EMA, metrics file, tracker and signal flag by themselves."""

import json
import math
import multiprocessing
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pgm_scale.errors import UserError
from pgm_scale.files import finite
from pgm_scale.parallel.state import ParameterState
from pgm_scale.tensor_slices import TensorSlice
from pgm_scale.training.ema import ExponentialMovingAverage
from pgm_scale.training.metrics import MetricsFile
from pgm_scale.training.step import seed_dropout
from pgm_scale.training.tracking import NoTracker, open_tracker
from tests.tiny_data import tiny_config


def test_ema_follows_its_formula_with_warm_up() -> None:
    weight = torch.zeros(3)
    state = ParameterState(
        "w", TensorSlice.whole((3,)), 0, weight, weight, weight, torch.zeros(()), False, True
    )
    average = ExponentialMovingAverage([state], decay=0.3)
    expected = 0.0
    for update in range(1, 8):
        weight.fill_(float(update))
        average.update()
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
        np.testing.assert_allclose(average.values[0].numpy(), expected, rtol=1e-6)


def test_metrics_file_drops_what_a_resume_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in range(1, 6):
        first.write({"step": step, "loss": math.nan if step == 2 else 0.5})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    resumed = MetricsFile(path, 3)
    resumed.write({"step": 4, "loss": 0.25})
    resumed.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[1]["loss"] is None
    assert records[3]["loss"] == 0.25


def test_finite_replaces_what_json_lacks() -> None:
    assert finite({"a": [math.inf, 1.0], "b": {"c": -math.inf}}) == {"a": [None, 1.0], "b": {"c": None}}


def test_dropout_seeds_differ_by_every_coordinate() -> None:
    def drawn(*coordinates: int) -> float:
        seed_dropout(*coordinates)
        return float(torch.rand(()))

    base = drawn(1, 2, 3, 4)
    assert drawn(1, 2, 3, 4) == base
    assert base not in {drawn(0, 2, 3, 4), drawn(1, 0, 3, 4), drawn(1, 2, 0, 4), drawn(1, 2, 3, 0)}


def _records_of(path: Path) -> Iterator[bytes]:
    """The records of wandb's transaction log: LevelDB's log format behind a header of 7 bytes."""
    content, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(content):
        if (left := -position % 32768) and left < 7:  # a record's header never crosses a block
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts.clear()


def _offline_history(folder: Path, last_step: int) -> tuple[set[str], list[int]]:
    """Run ids and logged steps of all offline sessions, read from wandb's own files.

    wandb's process writes them, some time after a session has ended: they are read until `last_step` is there.
    """
    deadline_s = time.monotonic() + 30
    while last_step not in (history := _written_history(folder))[1]:
        assert time.monotonic() < deadline_s, history
        time.sleep(0.2)
    return history


def _written_history(folder: Path) -> tuple[set[str], list[int]]:
    from wandb.proto import wandb_internal_pb2

    ids, steps = set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for content in _records_of(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            elif record.HasField("history"):
                steps.append(record.history.step.num)
    return ids, sorted(steps)


def test_wandb_sessions_share_a_run_and_no_step_is_sent_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    config = tiny_config(tmp_path, tmp_path, tracking={"wandb": "offline"})
    values: dict[str, Any] = {
        "loss": 1.0,
        "validation_nll": None,
        "cross_entropy_by_mask_fraction": [1.0, None],
    }
    for steps in (range(1, 6), range(4, 9)):  # the second session resumes from a checkpoint of step 3
        tracker = open_tracker(config, "abc123", tmp_path)
        for step in steps:
            tracker.log({"step": step, **values})
        tracker.close(60)
    ids, steps_sent = _offline_history(tmp_path, 8)
    assert ids == {"abc123"}
    assert steps_sent == [1, 2, 3, 4, 5, 6, 7, 8]
    secrets = [p for p in tmp_path.rglob("*") if p.is_file() and b"k" * 40 in p.read_bytes()]
    assert secrets == []


def _tracked_session(
    folder: Path, records: list[dict[str, Any]], to_service: signal.Signals | None, patience_s: float = 60
) -> None:
    """In a process of its own, as wandb keeps a dead connection for ever."""
    tracker = open_tracker(tiny_config(folder, folder, tracking={"wandb": "offline"}), "abc123", folder)
    tracker.log(records[0])
    if to_service is not None:
        services = [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]
        assert services
        for service in services:
            service.send_signal(to_service)
        if to_service == signal.SIGKILL:
            psutil.wait_procs(services)
    for record in records[1:]:
        tracker.log(record)
    tracker.close(patience_s)


@pytest.mark.fault(46)
def test_a_tracker_that_hangs_does_not_keep_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for its exit, as a batch script that requeues its job, would wait until it is too late."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    session = multiprocessing.get_context("spawn").Process(
        target=_tracked_session, args=(tmp_path, [{"step": 1, "loss": 1.0}], signal.SIGSTOP, 1.0)
    )
    session.start()
    session.join(60)
    ended_by_itself = not session.is_alive()
    session.kill()
    assert ended_by_itself
    assert not (tmp_path / "tracker.json").exists()  # the next session sends the step again


def test_a_tracker_that_cannot_start_stops_a_first_session_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr("wandb.init", fail)
    config = tiny_config(tmp_path, tmp_path, tracking={"wandb": "online"})
    with pytest.raises(UserError, match="wandb cannot start"):
        open_tracker(config, "abc123", tmp_path)
    (tmp_path / "tracker.json").write_text('{"last_step": ')  # damaged
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert isinstance(open_tracker(config, "abc123", tmp_path), NoTracker)


@pytest.mark.fault(46)
def test_a_tracker_that_dies_stops_nothing_and_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """wandb's own process is killed; the next session sends what is in the run's log and not there."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # the process of another test
    records = [{"step": step, "loss": 1.0 / step} for step in range(1, 7)]
    for share, to_service in ((records[:4], signal.SIGKILL), (records[4:], None)):
        session = multiprocessing.get_context("spawn").Process(
            target=_tracked_session, args=(tmp_path, share, to_service)
        )
        session.start()
        session.join(120)
        assert session.exitcode == 0
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in share)
    assert "wandb takes no records any more" in capfd.readouterr().err
    ids, steps_sent = _offline_history(tmp_path, 6)
    assert ids == {"abc123"}
    assert set(steps_sent) == {1, 2, 3, 4, 5, 6}
