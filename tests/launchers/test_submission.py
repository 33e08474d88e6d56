"""What is handed to sbatch; tests/ops/test_slurm_examples.py compares whole texts, for six kinds of clusters."""

import pickle
from pathlib import Path

import pytest
import yaml

from launchers.command import Stage, build_stage
from launchers.submission import sbatch_text
from pgm_scale.errors import UserError
from tests.tiny_data import write_tiny_data

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


def test_secrets_are_refused(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    tree = yaml.safe_load(Path(cluster).read_text())
    tree["slurm"]["environment"] = {"WANDB_API_KEY": "0123456789abcdef0123"}
    path = tmp_path / "with-secret.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="WANDB_API_KEY") as caught:
        sbatch_text(stage(str(path)))
    assert "0123456789abcdef" not in str(caught.value)


def test_a_pickle_holds_words_only(cluster: str) -> None:
    (job,) = stage(cluster).jobs
    assert pickle.loads(pickle.dumps(job)) == job
    assert b"step" not in pickle.dumps(job)


def test_the_local_stand_in_is_no_place_for_torchrun(tmp_path: Path) -> None:
    from launchers.submission import run_here

    path = tmp_path / "cluster.yaml"
    path.write_text("slurm: {tasks_per_node: 2, launcher: torchrun}\n")
    data = write_tiny_data(tmp_path / "data")
    words = (str(ROOT / "configs/owt.yaml"), f"folder={tmp_path / 'run'}", f"data.train={data}")
    with pytest.raises(UserError, match=r"set slurm\.launcher to srun"):
        run_here(build_stage("train", words, str(path), {}), print)
