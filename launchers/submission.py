"""From stages to Slurm, through submitit: sbatch texts, arrays, chains; or the same jobs on this machine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launchers.command import Stage
from launchers.job import Job
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes
from pgm_scale.secrets import check_free_of_secrets

# In bash, as they depend on the node and on the restart. No Python: it may live in a container.
_KEEP_SCRIPT = [
    "# Without it, a signal would end this script before what comes after srun.",
    "trap : TERM USR2",
]
_END_TIME = [
    "# A training starts a save only if it fits into the time that is left.",
    'export SLURM_JOB_END_TIME="${SLURM_JOB_END_TIME:-$(date -d '
    '"$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)" +%s)}"',
]
_RENDEZVOUS = [
    "# Rank 0 runs on this node; a port that nobody listens on, another one after each restart.",
    'MASTER_ADDR="$SLURMD_NODENAME"; getent hosts "$MASTER_ADDR" > /dev/null || MASTER_ADDR="$(hostname)"',
    'port="$(( 20000 + (SLURM_JOB_ID * 131 + ${SLURM_RESTART_COUNT:-0} * 7919) % 12000 ))"',
    'while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port="$(( port + 1 ))"; done',
    'export MASTER_ADDR MASTER_PORT="$port"',
]


def sbatch_text(stage: Stage, dependency: str | None = None) -> str:
    """What `submit` hands to sbatch.

    Raises:
        UserError: it would hold a secret of this environment.
    """
    executor = _slurm_executor(stage, dependency)
    if len(stage.jobs) > 1:
        executor.parameters["map_count"] = len(stage.jobs)
    text = executor._make_submission_file_text(executor._submitit_command_str, "")
    check_free_of_secrets(text, f"the sbatch text of {stage.name}", os.environ)
    _check_words(stage)
    return text


def submit(stage: Stage, dependency: str | None = None) -> list[str]:
    """Submit it and return the ids of its jobs, <array>_<index> of a sweep.

    Raises:
        UserError: no Slurm here, or sbatch refuses.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    sbatch_text(stage, dependency)  # refuses secrets
    try:
        stage.folder.mkdir(parents=True, exist_ok=True)
        executor = _slurm_executor(stage, dependency)
        with executor.batch():  # of several jobs an array
            jobs = [executor.submit(job) for job in stage.jobs]
    except OSError as error:
        raise UserError(
            f"{stage.folder} cannot be written ({error.strerror}); choose another run folder"
        ) from None
    except (FailedJobError, FailedSubmissionError) as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(f"sbatch refuses {stage.name}: {last}; look at it with --dry-run") from None
    return [job.job_id for job in jobs]


def dependency_on(stage: Stage, job_ids: list[str]) -> str:
    """What the next stage waits for: that all is well; of a preflight, which names bad nodes, only its end."""
    return f"{'afterany' if stage.is_preflight else 'afterok'}:{job_ids[0].partition('_')[0]}"


def tell_preflight(stage: Stage, job_id: str, next_jobs: list[str]) -> None:
    """Let `launchers.after` of a preflight know which jobs wait for it."""
    ids = sorted({job.partition("_")[0] for job in next_jobs})
    atomic_write_bytes(stage.folder / f"{job_id}_next.json", json.dumps(ids).encode())


def _slurm_executor(stage: Stage, dependency: str | None) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """An sbatch text can be written on a machine without Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    slurm = stage.slurm
    python = slurm.python or shlex.quote(sys.executable)
    executor = Executor(stage.folder, python=f"{slurm.container} {python}" if slurm.container else python)
    executor.update_parameters(
        job_name=stage.name,
        time=slurm.minutes,
        nodes=slurm.nodes,
        ntasks_per_node=slurm.slurm_tasks_per_node,
        gpus_per_node=slurm.gpus_per_node if slurm.gpus_per_node and not slurm.gres else None,
        gres=slurm.gres,
        cpus_per_task=slurm.cpus_per_task,
        mem=None if slurm.memory_gb_per_node is None else _memory(slurm.memory_gb_per_node),
        partition=slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        constraint=slurm.constraint,
        exclude=slurm.exclude,
        exclusive=slurm.exclusive or None,
        dependency=dependency,
        signal_delay_s=slurm.signal_before_s,
        wckey=None,
        setup=_setup(stage),
        teardown=_teardown(stage, executor.python),
        srun_args=_srun_words(stage),
        additional_parameters={
            "requeue": True,
            **({"kill-on-invalid-dep": "yes"} if dependency else {}),
            **slurm.sbatch,
        },
    )
    return executor


def _memory(gigabytes: int) -> str:
    return f"{gigabytes}GB" if gigabytes else "0"


def _setup(stage: Stage) -> list[str]:
    slurm = stage.slurm
    lines = [f"module load {shlex.quote(module)}" for module in slurm.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in slurm.environment.items()]
    lines += [*slurm.setup, *_KEEP_SCRIPT, *_END_TIME]
    return lines + (_RENDEZVOUS if slurm.processes > 1 else [])


def _srun_words(stage: Stage) -> list[str]:
    slurm = stage.slurm
    words = [f"--wait={slurm.exit_grace_s}", "--kill-on-bad-exit=0", *slurm.srun]
    if slurm.cpus_per_task is not None:  # since Slurm 22.05 srun does not take it over from sbatch
        words.append(f"--cpus-per-task={slurm.cpus_per_task}")
    return words


def _teardown(stage: Stage, python: str) -> list[str]:
    slurm = stage.slurm
    if any(word.startswith("--container") for word in slurm.srun):  # pyxis
        python = shlex.join(["srun", "--nodes=1", "--ntasks=1", *slurm.srun]) + f" {python}"
    folder = shlex.quote(str(stage.folder))
    return [
        "code=$?",
        'state="$(scontrol --oneliner show job "$SLURM_JOB_ID")"',
        f'commands="$({python} -m launchers.after {folder} --exit-code "$code" --state "$state" '
        f'--restarts {slurm.restarts_without_progress})"',
        'eval "$commands"',
        'exit "$code"',
        "",
    ]


def _check_words(stage: Stage) -> None:
    for job in stage.jobs:
        check_free_of_secrets(" ".join(job.words), f"the command line of {stage.name}", os.environ)


def run_here(stage: Stage, say: Callable[[str], None]) -> int:
    """Run the jobs of a stage on this machine, one after the other; the highest exit code."""
    _check_words(stage)
    stage.folder.mkdir(parents=True, exist_ok=True)
    return max(_run_here(stage, job, say) for job in stage.jobs)


def _run_here(stage: Stage, job: Job, say: Callable[[str], None]) -> int:
    from submitit.core.utils import environment_variables
    from submitit.local.local import LocalExecutor

    from pgm_scale.parallel.launch import free_port

    slurm = stage.slurm
    if job.launcher == "torchrun":
        raise UserError("--local starts the processes itself: set slurm.launcher to srun in the cluster file")
    executor = LocalExecutor(stage.folder)
    executor.update_parameters(
        timeout_min=slurm.minutes,
        tasks_per_node=slurm.processes,
        gpus_per_node=slurm.gpus_per_node,
        signal_delay_s=slurm.signal_before_s,
    )
    # Ctrl-C reaches all processes of a terminal: the tasks answer it, submitit's controller would kill them.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with environment_variables(MASTER_PORT=free_port(), **slurm.environment):
            running = executor.submit(job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    say(f"{stage.name}: {slurm.processes} processes here; logs {stage.folder}/{running.job_id}_*_log.err")
    _follow(running, say)
    codes = [_exit_code(stage.folder, running.job_id, task) for task in range(slurm.processes)]
    return max(codes)


def _follow(running: Any, say: Callable[[str], None]) -> None:
    """Print what task 0 says until all have ended; Ctrl-C asks them to stop, and goes on waiting for that."""
    read_bytes = {running.paths.stdout: 0, running.paths.stderr: 0}
    done = False
    while not done:
        try:
            done = running._process.poll() is not None
            for path, start in read_bytes.items():
                if path.exists():
                    with open(path, "rb") as file:
                        file.seek(start)
                        text = file.read()
                    read_bytes[path] = start + len(text)
                    sys.stderr.write(text.decode(errors="replace"))
            time.sleep(0.0 if done else 0.2)
        except KeyboardInterrupt:
            say("stopping: the tasks save first")
            running._process.send_signal(signal.SIGTERM)


def _exit_code(folder: Path, job: str, task: int) -> int:
    """Of a task; 137 where it could not write it: it was killed, or ended by its watchdog."""
    try:
        return int(json.loads((folder / f"{job}_{task}_exit.json").read_text())["code"])
    except (OSError, ValueError, KeyError):
        return 137
