"""One task of a job, each in a process of its own as submitit runs it: its files, its exit code and its signals."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.job import Job, TaskFiles, slurm_job_name

SECRET = "0123456789abcdef0123456789abcdef"

# Runs `job` with `main` in the place of the command, after submitit's handlers and a library's thread have come.
_TASK = """
import os, pickle, signal, sys, threading, time
import pgm_scale.cli
from pgm_scale.errors import HungRankError, UserError

def submitit(number, frame):
    print("submitit has", signal.Signals(number).name, flush=True)

def main(words):
{main}

for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
    signal.signal(number, submitit)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
pgm_scale.cli.main = main
pickle.loads(sys.stdin.buffer.read())()
"""


def _run(
    folder: Path, main: str, job: Job | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    job = job or Job(("train",), nodes=1, processes_per_node=1, answers_signals=True)
    body = "\n".join("    " + line for line in main.splitlines())
    given = {
        "SUBMITIT_FOLDER": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "WANDB_API_KEY": SECRET,
    }
    done = subprocess.run(
        [sys.executable, "-c", _TASK.format(main=body)],
        input=pickle.dumps(job),
        env=os.environ | given | environment,
        capture_output=True,
        timeout=60,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("main", "code"),
    [
        ("return 0", 0),
        ("return 75", 75),
        ("raise SystemExit(2)", 2),
        ("raise SystemExit", 0),
        ("sys.exit('no such thing')", 1),
        ("raise UserError('bad')", 2),
        ("raise HungRankError('rank 3')", 4),
        ("raise KeyboardInterrupt", 130),
        ("1 / 0", 1),
    ],
)
def test_exit_codes(tmp_path: Path, main: str, code: int) -> None:
    done = _run(tmp_path, main, SLURM_RESTART_COUNT="2")
    assert done.returncode == code, done.stderr
    end = _read(tmp_path / "7_0_exit.json")
    assert (end["code"], end["restart"]) == (code, 2)
    assert ("Traceback" in done.stderr) is ("1 / 0" in main)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "main",
    [
        "raise UserError('no login with ' + os.environ['WANDB_API_KEY'])",
        "sys.exit('no login with ' + os.environ['WANDB_API_KEY'])",
        "raise ValueError('no login with ' + os.environ['WANDB_API_KEY'])",
    ],
)
def test_what_it_prints_and_writes_holds_no_secret(tmp_path: Path, main: str) -> None:
    done = _run(tmp_path, main)
    assert "no login with <WANDB_API_KEY>" in done.stderr
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in done.stdout + done.stderr + written


@pytest.mark.fault(15)
def test_files_of_a_task(tmp_path: Path) -> None:
    """Those of task 0 and of another; what a killed task has left half written goes away, if it is its own."""
    for name in (
        "7_1_result.save_tmp",
        "7_0_result.save_tmp",
        "17_1_result.save_tmp",
        "7_11_result.save_tmp",
    ):
        (tmp_path / name).touch()
    job = Job(("train", "c.yaml"), nodes=1, processes_per_node=2, run_folder="/runs/x")
    assert _run(tmp_path, "return 0", job, SLURM_PROCID="1").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("7_0_result.save_tmp", "17_1_result.save_tmp", "7_11_result.save_tmp", "7_1_exit.json"),
    }
    assert _run(tmp_path, "return 0", job).returncode == 0
    about = _read(tmp_path / "7_job.json")
    assert (about["words"], about["run_folder"]) == (["train", "c.yaml"], "/runs/x")


def test_a_folder_that_cannot_be_written_stops_no_job(tmp_path: Path) -> None:
    done = _run(tmp_path / "none", "print('trained')\nreturn 0")
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert "cannot write how the job goes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("launcher", "tasks", "is_right"), [("srun", "4", True), ("srun", "2", False), ("torchrun", "4", False)]
)
def test_the_number_of_tasks(tmp_path: Path, launcher: str, tasks: str, is_right: bool) -> None:
    job = Job(("train",), nodes=2, processes_per_node=2, launcher=launcher)  # type: ignore[arg-type]
    done = _run(tmp_path, "return 0", job, SLURM_STEP_NUM_TASKS=tasks)
    assert done.returncode == (0 if is_right else 2)
    expected = 4 if launcher == "srun" else 2
    assert (f"made for {expected} tasks (2 nodes), and SLURM_STEP_NUM_TASKS is {tasks}" in done.stderr) is (
        not is_right
    )
    assert len(done.stderr.splitlines()) == (not is_right)


def test_a_local_task_in_the_shell_of_a_job(tmp_path: Path) -> None:
    """Of the job around it, neither the number of tasks nor the rank is taken."""
    job = Job(("train",), nodes=1, processes_per_node=2)
    main = (
        "print(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')))\nreturn 0"
    )
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "99", "SUBMITIT_LOCAL_NTASKS": "2"}
    rank = {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1"}
    done = _run(tmp_path, main, job, SLURM_STEP_NUM_TASKS="1", **local, **rank)
    assert (done.returncode, done.stdout) == (0, "1 1 2 127.0.0.1\n"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["99_1_exit.json"]


def test_relative_paths_are_of_the_folder_of_the_launch(tmp_path: Path) -> None:
    job = Job(("train",), 1, 1, launched_from=str(tmp_path))
    assert _run(tmp_path, "print(os.getcwd())", job).stdout == f"{tmp_path}\n"
    done = _run(tmp_path, "print(os.getcwd())", Job(("train",), 1, 1, launched_from=str(tmp_path / "none")))
    assert done.stdout == f"{Path.cwd()}\n"
    assert "cannot be entered here (No such file or directory)" in done.stderr
    assert done.returncode == 0


_SIGNALLED = """
os.kill(os.getpid(), signal.{name})
time.sleep(0.3)  # importing torch
from pgm_scale.training.signals import StopFlag
with StopFlag() as stop:
    stop.answers_interrupts = True
    print("answered", stop.signal_name, flush=True)
for number in (signal.SIGTERM, signal.SIGUSR2):
    os.kill(os.getpid(), number)  # again, when it has saved
return 75
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_signal_waits_for_the_handler_of_a_training(tmp_path: Path, name: str) -> None:
    """Also where a thread that does not block it gets it; and one after the save does not change the exit code."""
    done = _run(tmp_path, _SIGNALLED.format(name=name))
    assert (done.returncode, done.stdout) == (75, f"answered {name}\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", -signal.SIGTERM), ("SIGINT", -signal.SIGINT), ("SIGUSR2", 5)]
)
def test_signals_of_other_commands(tmp_path: Path, name: str, code: int) -> None:
    """Those that stop do; the warning before the time limit leaves them the time that is left."""
    main = f"os.kill(os.getpid(), signal.{name})\ntime.sleep(0.3)\nreturn 5"
    done = _run(tmp_path, main, Job(("eval",), 1, 1))
    assert (done.returncode, done.stdout) == (code, "")


def test_names_of_jobs() -> None:
    assert slurm_job_name({"SLURM_JOB_ID": "7"}) == "7"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm_job_name(array) == "7_2"
    files = TaskFiles.here(array | {"SUBMITIT_FOLDER": "/x", "SLURM_PROCID": "3"})
    assert (files.job, files.task, files.restart, files.is_local) == ("7_2", 3, 0, False)
