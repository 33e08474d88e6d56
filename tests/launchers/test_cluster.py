import re
from pathlib import Path

import pytest

from launchers.cluster import SlurmJob, load_slurm_job, minutes_of
from pgm_scale.errors import UserError

CLUSTER = """
slurm:
  nodes: 4
  gpus_per_node: 8
  time: 24:00:00
  environment: {NCCL_DEBUG: WARN, NCCL_NVLS_ENABLE: 0}
  jobs:
    prepare: {cpus_per_task: 32, time: 90}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def test_a_section_its_jobs_and_the_command_line(path: Path) -> None:
    train = load_slurm_job(path, "train", {"nodes": 2})
    assert (train.nodes, train.processes_per_node, train.processes) == (2, 8, 16)
    assert (train.minutes, train.environment) == (24 * 60, {"NCCL_DEBUG": "WARN", "NCCL_NVLS_ENABLE": "0"})
    prepare = load_slurm_job(path, "prepare", {"time": "60"}, {"nodes": 1, "gpus_per_node": 0})
    assert (prepare.processes, prepare.cpus_per_task, prepare.minutes) == (1, 32, 60)
    assert prepare.environment == train.environment


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("24:00:00", 1440), ("1-12:30:00", 2190), ("00:00:30", 1), ("100:00:00", 6000)],
)
def test_times(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


@pytest.mark.parametrize("time", ["24:00", "1 day", "", "-5", "1:2:3:4", "1-", "٣"])
def test_what_is_no_time(time: str) -> None:
    with pytest.raises(ValueError, match=re.escape(time) or "^$"):
        minutes_of(time)


def test_torchrun_is_one_task_a_node() -> None:
    job = SlurmJob(nodes=2, gpus_per_node=8, launcher="torchrun")
    assert (job.slurm_tasks_per_node, job.processes) == (1, 16)
    assert SlurmJob(nodes=2, tasks_per_node=3).processes == 6


def test_all_problems_at_once(path: Path) -> None:
    bad = {
        "nodes": 0,
        "tasks_per_node": 9,
        "time": "24:00",
        "environment": {"A B": "x"},
        "sbatch": {"gpus-per-node": "8"},
    }
    with pytest.raises(UserError) as caught:
        load_slurm_job(path, "train", bad)
    text = str(caught.value)
    assert "5 problem(s) in the slurm section for train" in text
    for part in (
        "slurm.nodes: 0 must be at least 1",
        "9 processes on 8 GPUs",
        "slurm.time: '24:00' is not",
        "slurm.environment: 'A B'",
        "use slurm.gpus_per_node",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partitions": "x"}, "slurm.partitions: unknown key; did you mean 'partition'"),
        ({"environment": ["x"]}, r"slurm.environment: expected a mapping, found \['x'\]"),
        ({"environment": {"A": {"b": 1}}}, "slurm.environment.A: expected str"),
        ({"signal_before_s": 7200, "time": "02:00:00"}, "slurm.signal_before_s: 7200 s before its end"),
        ({"environment": {"WANDB_API_KEY": "x"}}, r"slurm.environment.WANDB_API_KEY: a secret would be in"),
        ({"exit_grace_s": 0}, "slurm.exit_grace_s: 0 must be at least 1"),
        (
            {"gres": "gpu:a100:4"},
            "slurm.gres: gpu:a100:4 asks for 4 GPUs a node, and slurm.gpus_per_node is 8",
        ),
        ({"gres": "gpu"}, "slurm.gres: gpu asks for 1 GPUs"),
        ({"sbatch": {"output": "x"}}, "slurm.sbatch: 'output' is set by the launcher"),
        ({"sbatch": {"ntasks_per_node": "1"}}, "slurm.sbatch: 'ntasks_per_node' is set by the launcher"),
    ],
)
def test_single_problems(path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_slurm_job(path, "train", change)


@pytest.mark.parametrize(
    "gres", ["gpu:8", "gpu:a100:8", "gpu:h100_80gb:8(S:0-1)", "gpu:a:4,gpu:b:4", "nvme:1", "gpu:1g.5gb:2"]
)
def test_gres_that_fit_or_are_not_known(path: Path, gres: str) -> None:
    assert load_slurm_job(path, "train", {"gres": gres}).gres == gres


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("hardware: {}\n")
    with pytest.raises(UserError, match="has no `slurm` section"):
        load_slurm_job(path, "train", {})
    path.write_text("slurm: {jobs: [prepare]}\n")
    with pytest.raises(UserError, match=r"slurm.jobs: expected a mapping of commands to mappings"):
        load_slurm_job(path, "train", {})


def test_mistakes_in_the_parts_of_other_commands(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("slurm: {jobs: {prepar: {nodes: 1}, eval: {partitin: x}}}\n")
    with pytest.raises(UserError) as caught:
        load_slurm_job(path, "train", {}, commands=("train", "prepare", "eval"))
    lines = str(caught.value).splitlines()[1:]
    assert (
        lines[0]
        .strip()
        .startswith("slurm.jobs.prepar: no command that can be launched; known are train, prepare")
    )
    assert lines[1].strip().startswith("slurm.jobs.eval.partitin: unknown key")
