"""What submitit pickles, and every task of a job runs: one command of `pgm-scale`.

Only words and where they were given are pickled. A requeued job runs its first pickle again, so nothing in it may
say from where to go on: the run folder does. submitit's own checkpointing is not used: it acts in a signal handler
of rank 0 alone, while the other ranks train on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from pgm_scale.errors import UserError
from pgm_scale.secrets import redact

SUBMITIT_FOLDER = "SUBMITIT_FOLDER"  # set by submitit in each task: where its files of the job are
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """Call it in each task of the job; it ends the process with the command's exit code.

    Attributes:
        words: of the command line, without `pgm-scale`.
        run_folder: of a training.
        answers_signals: the command itself takes the stop signals; others end by them.
        launched_from: the folder in which relative paths of the words are meant.
    """

    words: tuple[str, ...]
    nodes: int
    processes_per_node: int
    launcher: Literal["srun", "torchrun"] = "srun"
    run_folder: str | None = None
    answers_signals: bool = False
    launched_from: str | None = None

    def __call__(self) -> None:
        _take_signals_from_submitit(self.answers_signals)
        files = TaskFiles.here(os.environ)
        files.remove_leftovers()
        if files.task == 0:
            files.write(
                "job", {"words": self.words, "run_folder": self.run_folder, "unix_time_s": time.time()}
            )
        code = self._run(files)
        files.write(
            f"{files.task}_exit", {"code": code, "restart": files.restart, "unix_time_s": time.time()}
        )
        sys.exit(code)

    def _run(self, files: TaskFiles) -> int:
        try:
            self._check_tasks(os.environ, files.is_local)
            self._enter_folder()
            if files.is_local:
                os.environ.update(_local_ranks(os.environ))
            if self.launcher == "torchrun":
                from launchers.torchrun import run_torchrun

                return run_torchrun(self.words, self.nodes, self.processes_per_node)
            from pgm_scale.cli import main

            return main(self.words)
        except UserError as error:
            print(redact(str(error)), file=sys.stderr)
            return error.exit_code
        except SystemExit as error:  # argparse
            if isinstance(error.code, str):
                print(redact(error.code), file=sys.stderr)
                return 1
            return error.code or 0
        except KeyboardInterrupt:
            return 130
        except Exception:
            # Not for submitit, which would pickle the text: it may hold anything.
            print(redact(traceback.format_exc()), file=sys.stderr)
            return 1

    def _enter_folder(self) -> None:
        """A container may start its processes elsewhere."""
        if self.launched_from is None:
            return
        try:
            os.chdir(self.launched_from)
        except OSError as error:
            print(
                f"warning: {self.launched_from}, where this was launched, cannot be entered here "
                f"({error.strerror}): relative paths may be wrong",
                file=sys.stderr,
            )

    def _check_tasks(self, environment: Mapping[str, str], is_local: bool) -> None:
        expected = self.nodes * (1 if self.launcher == "torchrun" else self.processes_per_node)
        name = "SUBMITIT_LOCAL_NTASKS" if is_local else "SLURM_STEP_NUM_TASKS"
        found = int(environment.get(name, expected))
        if found != expected:
            raise UserError(
                f"this job was made for {expected} tasks ({self.nodes} nodes), and {name} is {found}: one task a "
                "process is needed; look at `slurm.sbatch` and `slurm.srun` of the cluster file"
            )


def _take_signals_from_submitit(are_answered: bool) -> None:
    """Its handlers would requeue the job on rank 0 and swallow the signals on the others.

    Signals that the command answers wait for the command's own handler, which comes after slow imports: blocked
    here, and given back here by the threads of libraries that are loaded already, which do not block them. Others
    end the process, but USR2: there is nothing to save, so the time until the limit itself is the command's.
    """
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it with the others
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, _keep_for_later if are_answered else signal.SIG_DFL)
    if not are_answered:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _keep_for_later(number: int, frame: FrameType | None) -> None:
    """Runs in the main thread, whichever has got the signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    signal.raise_signal(number)


@dataclass(frozen=True)
class TaskFiles:
    """The files of one task in submitit's folder, beside submitit's own.

    <id>_job.json: the words and the run folder; <id>_<task>_exit.json: how the task ended, by itself.
    """

    folder: Path
    job: str
    task: int
    restart: int
    is_local: bool

    @staticmethod
    def here(environment: Mapping[str, str]) -> TaskFiles:
        folder = Path(environment[SUBMITIT_FOLDER])
        if environment.get("SUBMITIT_EXECUTOR") == "local":
            task = int(environment["SUBMITIT_LOCAL_GLOBALID"])
            return TaskFiles(folder, environment["SUBMITIT_LOCAL_JOB_ID"], task, 0, True)
        restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
        return TaskFiles(
            folder, slurm_job_name(environment), int(environment["SLURM_PROCID"]), restart, False
        )

    def write(self, name: str, content: object) -> None:
        """Not worth a job that could otherwise go on."""
        from pgm_scale.files import atomic_write_bytes

        try:
            atomic_write_bytes(self.folder / f"{self.job}_{name}.json", json.dumps(content).encode())
        except OSError as error:
            print(f"{self.folder}: cannot write how the job goes: {error.strerror}", file=sys.stderr)

    def remove_leftovers(self) -> None:
        """Of a task that was killed while submitit wrote: it refuses to write over them."""
        for leftover in self.folder.glob(f"{self.job}_{self.task}_*.save_tmp"):
            leftover.unlink(missing_ok=True)


def slurm_job_name(environment: Mapping[str, str]) -> str:
    """As submitit names the files of a job: its id, or <array's id>_<index>."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def _local_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of submitit's local executor."""
    return {
        "RANK": environment["SUBMITIT_LOCAL_GLOBALID"],
        "LOCAL_RANK": environment["SUBMITIT_LOCAL_LOCALID"],
        "WORLD_SIZE": environment["SUBMITIT_LOCAL_NTASKS"],
        "MASTER_ADDR": "127.0.0.1",
    }
