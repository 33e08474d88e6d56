"""What submitit pickles, and every task of a job runs: one command of `pgm-scale`.

Only words are pickled. A requeued job runs its first pickle again, so nothing in it may say from where to go on:
the run folder does. submitit's own checkpointing is not used: it acts in a signal handler of rank 0 alone, while
the other ranks train on.
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
from typing import Literal

from pgm_scale.errors import UserError

SUBMITIT_FOLDER = "SUBMITIT_FOLDER"  # set by submitit in each task: where its files of the job are
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """Call it in each task of the job; it ends the process with the command's exit code.

    Attributes:
        words: of the command line, without `pgm-scale`.
        run_folder: of a training.
        answers_signals: the command itself takes the stop signals; others end by them.
    """

    words: tuple[str, ...]
    nodes: int
    processes_per_node: int
    launcher: Literal["srun", "torchrun"] = "srun"
    run_folder: str | None = None
    answers_signals: bool = False

    def __call__(self) -> None:
        signal.signal(
            signal.SIGCONT, signal.SIG_DFL
        )  # submitit tells of each, and Slurm sends it with the others
        # Blocked, not handled: one that comes while torch is imported waits for the command's own handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        if not self.answers_signals:
            for number in _SIGNALS:  # submitit has handlers of its own
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
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
            self._check_tasks(os.environ)
            if files.is_local:
                os.environ.update(_local_ranks(os.environ))
            if self.launcher == "torchrun":
                from launchers.torchrun import run_torchrun

                return run_torchrun(self.words, self.nodes, self.processes_per_node)
            from pgm_scale.cli import main

            return main(self.words)
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        except SystemExit as error:  # argparse
            return error.code if isinstance(error.code, int) else 1
        except Exception:
            # Not for submitit, which would pickle the text: it may hold anything.
            from pgm_scale.secrets import redact

            print(redact(traceback.format_exc(), os.environ), file=sys.stderr)
            return 1

    def _check_tasks(self, environment: Mapping[str, str]) -> None:
        expected = self.nodes * (1 if self.launcher == "torchrun" else self.processes_per_node)
        name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SUBMITIT_LOCAL_NTASKS"
        found = int(environment.get(name, expected))
        if found != expected:
            raise UserError(
                f"this job was made for {expected} tasks ({self.nodes} nodes), and {name} is {found}: one task a "
                "process is needed; look at `slurm.sbatch` and `slurm.srun` of the cluster file"
            )


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
