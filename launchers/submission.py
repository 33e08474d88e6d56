"""From stages to Slurm, through submitit: sbatch texts, arrays, chains."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from launchers.after import NextJobs
from launchers.command import SINGLE, Stage
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes
from pgm_scale.secrets import check_free_of_secrets

# How to reach Slurm, from inside a job too.
_REACHES_SLURM = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# In bash, as they depend on the node and on the restart. No Python: it may live in a container.
_KEEP_SCRIPT = [
    "# Neither a signal nor an exit code may end this script before what comes after srun.",
    "trap : TERM USR2",
    "set +eu",
    "# The number alone may be that of a whole array.",
    'job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}"',
]
_END_TIME = [
    "# A training starts a save only if it fits into the time that is left.",
    'end="$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs "$job" --format %e)"',
    'if [ -n "$end" ]; then export SLURM_JOB_END_TIME="$(date -d "$end" +%s)"; fi',
]
_MASTER_ADDRESS = [
    "# Rank 0 runs on this node.",
    'MASTER_ADDR="$SLURMD_NODENAME"; getent hosts "$MASTER_ADDR" > /dev/null || MASTER_ADDR="$(hostname)"',
]
_RENDEZVOUS = [
    "# A port that nobody listens on, another one after each restart.",
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
    check_words(stage)
    return text


def submit(stage: Stage, dependency: str | None = None) -> list[str]:
    """Submit it and return the ids of its jobs, <array>_<index> of a sweep.

    Raises:
        UserError: no Slurm here, or sbatch refuses.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    sbatch_text(stage, dependency)  # refuses secrets
    if missing := [program for program in ("sbatch", "srun") if shutil.which(program) is None]:
        raise UserError(
            f"no Slurm here ({missing[0]} not found): launch on a login node, or try --dry-run or --local"
        )
    try:
        stage.folder.mkdir(parents=True, exist_ok=True)
        executor = _slurm_executor(stage, dependency)
        with _outside_of_jobs(), executor.batch():  # of several jobs an array
            jobs = [executor.submit(job) for job in stage.jobs]
    except OSError as error:
        raise unwritable(stage, error) from None
    except (FailedJobError, FailedSubmissionError) as error:
        said = str(error).strip() or "it does not say why"
        raise UserError(
            f"sbatch refuses {stage.name}: {said.splitlines()[-1]}; look at it with --dry-run"
        ) from None
    return [job.job_id for job in jobs]


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Launched from a shell inside a job, sbatch would hand that job's sizes, ids and ranks on to the new one."""
    names = [
        name
        for name in (os.environ if "SLURM_JOB_ID" in os.environ else ())
        if (name.startswith(_OF_A_JOB) and name not in _REACHES_SLURM) or name in _OF_A_RANK
    ]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def unwritable(stage: Stage, error: OSError) -> UserError:
    return UserError(f"{stage.folder} cannot be written ({error.strerror}); choose another run folder")


def dependency_on(stage: Stage, job_ids: list[str]) -> str:
    """What the next stage waits for: that all is well; of a preflight, which names bad nodes, only its end."""
    return f"{'afterany' if stage.is_preflight else 'afterok'}:{job_ids[0].partition('_')[0]}"


def tell_preflight(stage: Stage, job_id: str, following: Stage, next_jobs: list[str]) -> None:
    """Let `launchers.after` of a preflight know which jobs wait for it."""
    ids = sorted({job.partition("_")[0] for job in next_jobs})
    waiting = NextJobs(tuple(ids), following.slurm.exclude or "")
    atomic_write_bytes(stage.folder / f"{job_id}_next.json", json.dumps(vars(waiting)).encode())


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
            **{name: value or True for name, value in slurm.sbatch.items()},
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
    if slurm.processes == 1 and stage.command in SINGLE:
        return lines
    return lines + ([] if "MASTER_ADDR" in slurm.environment else _MASTER_ADDRESS) + _RENDEZVOUS


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
        'state="$(scontrol --oneliner show job "$job")"',
        f'commands="$({python} -m launchers.after {folder} --exit-code "$code" --state "$state" '
        f'--restarts {slurm.restarts_without_progress})"',
        'eval "$commands"',
        'exit "$code"',
        "",
    ]


def check_words(stage: Stage) -> None:
    for job in stage.jobs:
        check_free_of_secrets(" ".join(job.words), f"the command line of {stage.name}", os.environ)
