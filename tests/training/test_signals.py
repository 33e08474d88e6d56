"""The stop flag and the end of the job by themselves, and a training that must not start a save any more."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import Preempted
from pgm_scale.parallel.launch import find_launch
from pgm_scale.parallel.mesh import Mesh, connected
from pgm_scale.training.checkpointing import Checkpointer
from pgm_scale.training.loop import train_on_mesh
from pgm_scale.training.signals import JobEnd, StopFlag
from tests.distributed import run_ranks
from tests.tiny_data import tiny_config, write_tiny_data


def test_the_first_signal_wins_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGUSR2"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_that_was_blocked_before_is_answered_at_the_entry(number: signal.Signals) -> None:
    """As a launcher leaves it: sent while torch was imported, when nobody could answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        # To this thread: another one, of pytest-xdist, would take one that is sent to the process.
        signal.pthread_kill(threading.get_ident(), number)
        with StopFlag() as stop:
            assert stop.signal_name == number.name
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_ctrl_c_ends_at_once_what_does_not_train_yet() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with StopFlag() as stop:
        stop.answers_interrupts = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"


def test_blocked_ctrl_c_ends_it_too() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    handler = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), StopFlag():
            pass
        assert signal.getsignal(signal.SIGTERM) is handler[0]
    finally:
        signal.signal(signal.SIGINT, handler[1])
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


ENDING = """
import os, signal, sys, threading, time
from pgm_scale.training.signals import StopFlag

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])
with StopFlag() as stop:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.signal_name == "SIGUSR2"
os.kill(os.getpid(), signal.SIGUSR2)
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(75)
"""


def test_a_signal_that_comes_while_the_process_ends_does_not_change_its_exit_code() -> None:
    """It was blocked before, and threads of the training have it unblocked."""
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr


def _end_in(seconds: float) -> JobEnd:
    return JobEnd({"SLURM_JOB_END_TIME": str(int(time.time() + seconds))})


def test_a_save_has_to_fit_before_the_end_of_the_job() -> None:
    assert not _end_in(100).is_too_near(50)
    assert _end_in(100).is_too_near(70), "it may take half as long again"
    assert not _end_in(20).is_too_near(0), "not known yet"
    assert _end_in(3).is_too_near(0)
    assert _end_in(-20).is_too_near(0), "over: the scheduler is about to end it"
    assert 95 < _end_in(100).left_s <= 100


@pytest.mark.parametrize("text", [None, "", "N/A", "-1", "1e9", "²"])
def test_without_a_known_end_there_is_time(text: str | None) -> None:
    assert not JobEnd({} if text is None else {"SLURM_JOB_END_TIME": text}).is_too_near(1e6)


def test_a_job_that_lives_on_was_given_more_time() -> None:
    assert not _end_in(-3600).is_too_near(50)


def _train_until_refused(mesh: Mesh, config: RunConfig, signalled: bool) -> list[Any]:
    """The end of the job comes near, on rank 0 only, when the first save is done. Its message and exit code,
    and the steps that were saved afterwards."""
    save, started = Checkpointer.save, []

    def saving(self: Checkpointer, step: int, state: dict[str, Any]) -> bool:
        started.append(f"step {step}")
        done = save(self, step, state)
        self.save_s = 1000.0
        return done

    class Signalled(StopFlag):
        """From the second step on."""

        @property
        def signal_name(self) -> str | None:
            return "SIGTERM" if signalled and mesh.rank == 1 and started else None

        @signal_name.setter
        def signal_name(self, name: str | None) -> None:
            pass

    end = str(int(time.time() + 900)) if mesh.is_main else ""
    with (
        patch.dict(os.environ, SLURM_JOB_END_TIME=end),
        patch.object(Checkpointer, "save", saving),
        Signalled() as stop,
    ):
        try:
            splits = SplitStorage(config.data.train), SplitStorage(config.data.validation)
            train_on_mesh(config, mesh, *splits, stop)
            text, code = "finished", 0
        except Preempted as error:
            text, code = str(error), error.exit_code
    return mesh.gather((text, code, started))


@pytest.mark.fault(30)
@pytest.mark.parametrize("signalled", [False, True])
def test_a_save_that_does_not_fit_is_not_started(tmp_path: Path, signalled: bool) -> None:
    """Rank 0 alone knows the end, rank 1 alone the signal: both leave together, and the older checkpoint stands."""
    config = tiny_config(
        write_tiny_data(tmp_path / "data"),
        tmp_path / "run",
        training={"steps": 9, "micro_batch_sequences": 4, "log_interval_steps": 1},
        checkpoint={"interval_steps": 3, "asynchronous": False},
        validation={"interval_steps": 9, "samples": 0},
    )
    told = run_ranks(2, _train_until_refused, config, signalled)
    refused = 4 if signalled else 6
    for text, code, started in told:
        assert text.startswith(f"step {refused} is not saved: the job ends in ")
        assert "the checkpoint of step 3 stands: run the same command to go on" in text
        assert code == 75
        assert started == ["step 3"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000003"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == refused - 1


def _train_until_killed_in_the_save(config: RunConfig) -> None:
    """A signal comes in step 1; the save that answers it never ends."""

    def killed(self: Checkpointer, step: int, state: dict[str, Any]) -> bool:
        saved = self.store.save(step, self._owned_fragments(), self._full_state(step, state))
        assert saved
        os.kill(os.getpid(), signal.SIGKILL)
        return saved

    class Signalled(StopFlag):
        @property
        def signal_name(self) -> str | None:
            return "SIGTERM"

        @signal_name.setter
        def signal_name(self, name: str | None) -> None:
            pass

    splits = SplitStorage(config.data.train), SplitStorage(config.data.validation)
    with patch.object(Checkpointer, "save", killed), connected(find_launch({})) as mesh, Signalled() as stop:
        train_on_mesh(config, mesh, *splits, stop)


@pytest.mark.fault(71)
def test_a_kill_during_the_save_of_a_signal_leaves_no_hole_in_the_records(tmp_path: Path) -> None:
    config = tiny_config(
        write_tiny_data(tmp_path / "data"), tmp_path / "run", training={"steps": 3}, validation={"samples": 0}
    )
    process = multiprocessing.get_context("spawn").Process(
        target=_train_until_killed_in_the_save, args=(config,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run_ranks(1, _train, config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on_mesh(config, mesh, SplitStorage(config.data.train), SplitStorage(config.data.validation))
