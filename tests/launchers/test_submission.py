"""What is handed to sbatch; tests/ops/test_slurm_examples.py compares whole texts, for six kinds of clusters."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launchers.command import Stage, build_stage
from launchers.submission import sbatch_text
from pgm_scale.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text("slurm: {nodes: 2, tasks_per_node: 2, python: python3}\n")
    return str(path)


def stage(cluster: str, *words: str, command: str = "train") -> Stage:
    given = (str(ROOT / "configs/owt.yaml"), "folder=/runs/x", *words) if command == "train" else words
    return build_stage(command, given, cluster, {})


def test_a_sweep_is_an_array_with_a_run_for_each_value(cluster: str) -> None:
    swept = stage(cluster, "optimizer.learning_rate=1e-4,3e-4", "training.seed=1,2")
    assert swept.folder == Path("/runs/x-sweep/jobs")
    assert [job.run_folder for job in swept.jobs] == [
        f"/runs/x-learning_rate={rate}-seed={seed}" for rate in ("1e-4", "3e-4") for seed in (1, 2)
    ]
    text = sbatch_text(swept)
    assert "#SBATCH --array=0-3%4\n" in text
    assert "/runs/x-sweep/jobs/%A_%a_%t_log.out" in text


def test_a_chain_waits_and_is_cancelled_with_what_it_waits_for(cluster: str) -> None:
    text = sbatch_text(stage(cluster), "afterok:12")
    assert "#SBATCH --dependency=afterok:12\n" in text
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in text


def test_single_process_commands(cluster: str) -> None:
    prepare = stage(cluster, "python-docs", "--output", "/data/x", command="prepare")
    text = sbatch_text(prepare)
    assert prepare.slurm.processes == 1
    assert "MASTER_PORT" not in text
    assert "#SBATCH --nodes=1\n" in text


def test_what_the_command_would_refuse_is_refused_before(
    cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="is not divisible by micro_batch_sequences"):
        stage(cluster, "training.global_batch_sequences=30")
    with pytest.raises(UserError, match=r"optimizer\.learnin_rate: unknown key"):
        stage(cluster, "optimizer.learnin_rate=1,2")
    with pytest.raises(SystemExit):
        stage(cluster, "--drwas", "4", command="eval")
    assert "--drwas" in capsys.readouterr().err


def test_a_distillation_may_follow_its_teacher(cluster: str) -> None:
    words = [str(ROOT / "configs/owt_sdtt.yaml"), "folder=/runs/student", "objective.teacher=/runs/none-yet"]
    with pytest.raises(UserError, match=r"objective\.teacher"):
        build_stage("distill", words, cluster, {})
    following = build_stage("distill", words, cluster, {}, follows=True)
    assert following.jobs[0].run_folder == "/runs/student"


@pytest.mark.fault(28)
def test_secrets_are_refused(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    tree = yaml.safe_load(Path(cluster).read_text())
    tree["slurm"]["environment"] = {"WANDB_API_KEY": "0123456789abcdef0123"}
    path = tmp_path / "with-secret.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="WANDB_API_KEY") as caught:
        sbatch_text(stage(str(path)))
    assert "0123456789abcdef" not in str(caught.value)


@pytest.mark.fault(28)
def test_a_pickle_holds_words_only(cluster: str) -> None:
    (job,) = stage(cluster).jobs
    assert pickle.loads(pickle.dumps(job)) == job
    assert b"step" not in pickle.dumps(job)


_PROGRAMS = {
    "srun": 'env > "$(dirname "$0")/task"; exit 75',
    "squeue": '[ "$*" != "--noheader --jobs 7_1 --format %e" ] || cat "$(dirname "$0")/end"',
    "scontrol": 'echo "$@" >> "$(dirname "$0")/calls"; echo "JobId=7 JobState=RUNNING Reason=None Restarts=0"',
}


def _run_script(folder: Path, text: str) -> dict[str, str]:
    """As Slurm runs that of the last job of an array; returns what the tasks see."""
    for name, body in _PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURMD_NODENAME": "n1",
    }
    environment = {**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    return dict(line.split("=", 1) for line in (folder / "task").read_text().splitlines() if "=" in line)


@pytest.mark.parametrize(("end", "end_unix_s"), [("1970-01-02T00:00:00", str(24 * 3600)), ("", None)])
def test_the_script_as_it_runs(tmp_path: Path, end: str, end_unix_s: str | None) -> None:
    """Its own job of the array is asked for and requeued, whatever bash was told before, and without an answer of
    squeue there is no end of the job, rather than a wrong one."""
    (tmp_path / "end").write_text(end)
    path = tmp_path / "cluster.yaml"
    slurm = {
        "python": sys.executable,
        "setup": ["set -eu"],
        "environment": {"MASTER_ADDR": "ib0", "TZ": "UTC"},
    }
    path.write_text(yaml.safe_dump({"slurm": slurm}))
    built = stage(str(path), f"folder={tmp_path}/run")
    built.folder.mkdir(parents=True)
    task = _run_script(tmp_path, sbatch_text(built))
    assert task.get("SLURM_JOB_END_TIME") == end_unix_s
    assert task["MASTER_ADDR"] == "ib0"
    assert 20_000 <= int(task["MASTER_PORT"]) < 33_000
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--oneliner show job 7_1", "requeue 7_1"]


def test_options_without_a_value(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("slurm: {sbatch: {contiguous: '', reservation: x}}\n")
    lines = sbatch_text(stage(str(path))).splitlines()
    assert {"#SBATCH --contiguous", "#SBATCH --reservation=x"} <= set(lines)
