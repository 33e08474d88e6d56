"""`--local`: the jobs of a stage on this machine, one process a task, by submitit's local executor."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from launchers.command import Stage
from launchers.job import Job
from launchers.submission import check_words, unwritable
from pgm_scale.errors import UserError
from pgm_scale.training.signals import answered_signals

_INTERRUPTED, _KILLED = 130, 137  # exit codes, as a shell gives them
_ASK_AGAIN_S = 2.0


def run_here(stage: Stage, say: Callable[[str], None]) -> int:
    """Run the jobs of a stage on this machine, one after the other; the highest exit code.

    A signal that would stop this process stops the job that runs, which may save first; no other is begun then.

    Raises:
        UserError: this machine or the folder cannot be used.
    """
    check_words(stage)
    if stage.slurm.launcher == "torchrun":
        raise UserError("--local starts the processes itself: set slurm.launcher to srun in the cluster file")
    try:
        stage.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(stage, error) from None
    code = 0
    with _StopRequest() as stop:
        for job in stage.jobs:
            if stop.came:
                return max(code, _INTERRUPTED)
            code = max(code, _run_here(stage, job, say, stop))
    return code


class _StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.came = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in answered_signals():
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.came = True


def _run_here(stage: Stage, job: Job, say: Callable[[str], None], stop: _StopRequest) -> int:
    from submitit.core.utils import environment_variables
    from submitit.local.local import LocalExecutor

    from pgm_scale.parallel.launch import free_port

    slurm = stage.slurm
    executor = LocalExecutor(stage.folder)
    executor.update_parameters(
        timeout_min=slurm.minutes,
        tasks_per_node=slurm.processes,
        gpus_per_node=slurm.nodes * slurm.gpus_per_node,
        visible_gpus=_visible_gpus(slurm.nodes * slurm.gpus_per_node),
        signal_delay_s=slurm.signal_before_s,
    )
    started_unix_s = time.time()
    # Ctrl-C reaches all processes of a terminal: the tasks answer it, submitit's controller would kill them.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with environment_variables(**(slurm.environment | {"MASTER_PORT": str(free_port())})):
            running = executor.submit(job)
    except OSError as error:
        raise unwritable(stage, error) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    say(f"{stage.name}: {slurm.processes} processes here; logs {stage.folder}/{running.job_id}_*_log.err")
    _follow(running, say, stop)
    return max(
        _exit_code(stage.folder, running.job_id, task, started_unix_s) for task in range(slurm.processes)
    )


def _visible_gpus(wanted: int) -> tuple[int, ...]:
    """The first ones of CUDA_VISIBLE_DEVICES, as submitit would take GPUs 0, 1, ...; () if it does not say."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not names or not all(name.isdecimal() for name in names):
        return ()
    if len(names) < wanted:
        raise UserError(
            f"--local needs {wanted} GPUs, and CUDA_VISIBLE_DEVICES names {len(names)}: give --gpus-per-node and "
            "--nodes of this machine"
        )
    return tuple(map(int, names))


def _follow(running: Any, say: Callable[[str], None], stop: _StopRequest) -> None:
    """Print what task 0 says until all have ended; asked to stop, ask them, and go on waiting."""
    read_bytes = {running.paths.stdout: 0, running.paths.stderr: 0}
    asked_s: float | None = None
    done = False
    try:
        while not done:
            done = running._process.poll() is not None
            for path in read_bytes:
                read_bytes[path] += _copy(path, read_bytes[path])
            if stop.came and not done:
                if asked_s is None:
                    say("stopping: a training saves first")
                # Again and again: the first may come before submitit's controller has started the tasks.
                if asked_s is None or time.monotonic() - asked_s > _ASK_AGAIN_S:
                    running._process.send_signal(signal.SIGTERM)
                    asked_s = time.monotonic()
            time.sleep(0.0 if done else 0.2)
    finally:
        if not done:  # nobody reads what we print
            running._process.send_signal(signal.SIGTERM)


def _copy(path: Path, start: int) -> int:
    """Of a log that grows; returns how much was new."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read()
    sys.stderr.write(text.decode(errors="replace"))
    return len(text)


def _exit_code(folder: Path, job: str, task: int, started_unix_s: float) -> int:
    """Of a task; 137 where it could not write it: it was killed, or ended by its watchdog."""
    try:
        end = json.loads((folder / f"{job}_{task}_exit.json").read_text())
        # Jobs here are named by a process id, which another may have had before.
        return int(end["code"]) if end["unix_time_s"] >= started_unix_s else _KILLED
    except (OSError, ValueError, KeyError):
        return _KILLED
