"""FAULTS 6: two runs in one folder, and locks of the dead."""

import dataclasses
import os
import signal
import socket
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pgm_scale.checkpoint.lock import RunLock
from pgm_scale.errors import UserError
from pgm_scale.holder import Holder, start_ticks
from tests.checkpoint.support import in_child, kill_before_call

FAST = {"heartbeat_interval_s": 0.05, "dead_after_s": 0.6}


def write_lock(folder: Path, **changes: Any) -> Path:
    path = folder / "run.lock"
    path.write_bytes(dataclasses.replace(Holder.here(), **changes).to_bytes())
    return path


def fork_holder(folder: Path) -> int:
    """A process that holds the lock until it is killed."""
    pid = os.fork()
    if pid == 0:
        RunLock(folder, **FAST).acquire()
        signal.pause()
        os._exit(0)
    while not (folder / "run.lock").exists():
        time.sleep(0.01)
    return pid


def test_lock_is_given_back(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path / "run") as lock:
            lock.check()
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.fault(6)
def test_second_run_is_refused_with_the_holder_and_a_killed_one_is_recovered(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    pid = fork_holder(tmp_path)
    try:
        monkeypatch.delenv("SLURM_JOB_ID")
        for stop in (signal.SIGCONT, signal.SIGSTOP):  # a stopped holder is alive too
            os.kill(pid, stop)
            with pytest.raises(UserError, match=f"host {socket.gethostname()}, pid {pid}, job 4711"):
                RunLock(tmp_path, **FAST).acquire()
    finally:
        os.kill(pid, signal.SIGKILL)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) is None:  # dead, but still a zombie
        pass
    with RunLock(tmp_path, **FAST):
        assert f"pid {pid}" in caplog.text
    os.waitpid(pid, 0)
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(6)
def test_reused_process_id_is_not_the_holder(tmp_path):
    write_lock(tmp_path, start_ticks="1")
    with RunLock(tmp_path, dead_after_s=1000) as lock:
        lock.check()


def test_holder_elsewhere_lives_while_its_heartbeat_moves(tmp_path):
    path = write_lock(tmp_path, machine="another", host="node7", pid=12)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(UserError, match="host node7, pid 12"):
            RunLock(tmp_path, heartbeat_interval_s=0.2, dead_after_s=30).acquire()
    finally:
        stop.set()
        heart.join()


@pytest.mark.fault(6)
@pytest.mark.parametrize("content", [None, b"", b'{"host": 3}', b"\xff"])
def test_holder_elsewhere_is_dead_when_its_heartbeat_stands_still(tmp_path, content):
    path = write_lock(tmp_path, machine="another")
    if content is not None:
        path.write_bytes(content)
    started_s = time.monotonic()
    with RunLock(tmp_path, **FAST) as lock:
        assert time.monotonic() - started_s >= FAST["dead_after_s"]
        lock.check()


def test_heartbeat_moves(tmp_path):
    with RunLock(tmp_path, **FAST) as lock:
        before = lock.path.stat().st_mtime_ns
        deadline_s = time.monotonic() + 10
        while lock.path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


@pytest.mark.fault(6)
def test_a_lock_that_was_taken_over_is_noticed_and_left_alone(tmp_path):
    with RunLock(tmp_path, **FAST) as lock:
        theirs = write_lock(tmp_path, pid=1)
        with pytest.raises(UserError, match="has lost"):
            lock.check()
    assert theirs.exists()


def living_holder() -> dict[str, Any]:
    """Our parent process, as if it held the lock."""
    return {"pid": os.getppid(), "start_ticks": start_ticks(os.getppid())}


def test_a_faster_starter_is_not_evicted(tmp_path, monkeypatch):
    """It recovers the dead lock between our look at it and our rename of it."""
    write_lock(tmp_path, start_ticks="1")
    real = os.rename

    def rename(source, target):
        monkeypatch.setattr(os, "rename", real)
        write_lock(tmp_path, **living_holder())
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match=f"pid {os.getppid()}"):
        RunLock(tmp_path, **FAST).acquire()
    assert os.listdir(tmp_path) == ["run.lock"]
    assert f'"pid": {os.getppid()}' in (tmp_path / "run.lock").read_text()


def test_a_lock_that_changes_hands_while_we_watch_is_not_touched(tmp_path, monkeypatch):
    write_lock(tmp_path, machine="another")

    def no_rename(*_):
        raise AssertionError("a living lock was moved")

    monkeypatch.setattr(os, "rename", no_rename)
    monkeypatch.setattr(time, "sleep", lambda _: write_lock(tmp_path, **living_holder()))
    with pytest.raises(UserError, match=f"pid {os.getppid()}"):
        RunLock(tmp_path, **FAST).acquire()


@pytest.mark.fault(6)
def test_of_many_runs_started_at_once_on_a_dead_lock_one_wins(tmp_path):
    for _ in range(5):
        write_lock(tmp_path, start_ticks="1")
        go, pids = tmp_path / "go", []
        for number in range(6):
            pid = os.fork()
            if pid == 0:
                while not go.exists():
                    pass
                try:
                    RunLock(tmp_path).acquire()
                    (tmp_path / f"won{number}").touch()
                except UserError:
                    (tmp_path / f"refused{number}").touch()
                signal.pause()
            pids.append(pid)
        go.touch()
        while len([*tmp_path.glob("won*"), *tmp_path.glob("refused*")]) < len(pids):
            time.sleep(0.01)
        winners = list(tmp_path.glob("won*"))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert len(winners) == 1
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.fault(8)
def test_unwritable_folder_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)

        def start():
            if os.geteuid() == 0:
                os.setuid(65534)
            RunLock(folder).acquire()

        status, error = in_child(start)
    assert status == 0
    assert isinstance(error, UserError)
    assert "cannot be locked (Permission denied)" in str(error)


@pytest.mark.fault(72)
def test_what_killed_starters_have_left_is_removed_and_that_of_live_ones_stays(tmp_path: Path) -> None:
    """Starters are killed before each operation on files in turn; one that lives is at work all the time."""
    living = tmp_path / ".run.lock.of_a_starter_that_lives"
    living.write_bytes(Holder.here().to_bytes())
    unfinished = tmp_path / ".run.lock.of_one_that_has_just_begun"
    unfinished.touch()

    def start_and_die(number: int) -> None:
        kill_before_call(number)
        RunLock(tmp_path, **FAST).acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    left = set()
    for number in range(8):
        in_child(partial(start_and_die, number))
        left |= set(os.listdir(tmp_path))
    assert len(left) > 4, "some were killed at work"
    with RunLock(tmp_path, **FAST):
        assert set(os.listdir(tmp_path)) == {"run.lock", living.name, unfinished.name}
    os.utime(unfinished, ns=(0, time.time_ns() - 2 * 3_600_000_000_000))
    with RunLock(tmp_path, **FAST):
        assert set(os.listdir(tmp_path)) == {"run.lock", living.name}
