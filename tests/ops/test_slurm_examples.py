"""The texts in ops/slurm_examples are what the launcher writes today, and their layouts divide."""

import re
import subprocess
from pathlib import Path

import pytest

from ops.slurm_examples import EXAMPLES, FOLDER, PUBLISHED, SCALE, STYLES
from ops.slurm_examples.__main__ import texts
from pgm_scale import config as configuration
from pgm_scale.parallel.layout import data_parallel_ranks, layout_problems
from pgm_scale.planning.cluster import load_hardware


@pytest.fixture(scope="module")
def expected():
    """Each text by the name of its example."""
    return {path.stem: text for path, text in texts()}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_is_what_would_be_submitted(example, expected):
    path = FOLDER / f"{example.name}.sh"
    text = path.read_text()
    assert text == expected[example.name], "write them again: python -m ops.slurm_examples"
    assert str(Path.cwd()) not in text
    subprocess.run(["bash", "-n", path], check=True)


def test_no_other_text_lies_there(expected):
    assert {path.stem for path in FOLDER.glob("*.sh")} == set(expected)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_all_processes_that_are_asked_for_have_work(example, expected):
    text = expected[example.name]
    asked = {key: int(value) for key, value in re.findall(r"#SBATCH --(nodes|ntasks-per-node)=(\d+)", text)}
    gpus = load_hardware(f"configs/clusters/{example.cluster}.yaml").gpus_per_node
    # With torchrun one task a node starts them all.
    assert asked == {"nodes": example.nodes, "ntasks-per-node": 1 if "gcp" in example.cluster else gpus}
    assert f"gpu:a100:{gpus}" in text or f"--gpus-per-node={gpus}" in text
    config = configuration.load(example.config, example.overrides)
    processes = example.nodes * gpus
    assert layout_problems(config, processes) == []
    passes = data_parallel_ranks(config, processes) * config.training.micro_batch_sequences
    assert config.training.global_batch_sequences % passes == 0


def test_published_runs_have_the_published_gpus():
    """FACTS 2.2, 5 and 6.1: sequences a GPU x GPUs, one pass a step."""
    found = {}
    for example in PUBLISHED:
        training = configuration.load(example.config, example.overrides).training
        found[example.name] = (
            training.micro_batch_sequences,
            example.nodes * 4,
            training.global_batch_sequences,
        )
    assert found == {
        "lm1b-pgm-6-6": (64, 8, 512),
        "owt-pgm-8-8": (32, 16, 512),
        "imagenet-pgm-12-12": (16, 16, 256),
        "imagenet-maskgit-large": (16, 16, 256),
        "owt-pgm-8-8-sdtt": (16, 8, 128),
    }


def test_every_style_of_cluster_has_an_example():
    files = {path.stem for path in Path("configs/clusters").glob("*.yaml")} - {"local-2x2"}
    assert {example.cluster for example in STYLES} == files
    assert {Path(example.config) for example in SCALE} == set(Path("configs/scale").glob("*.yaml"))


@pytest.mark.parametrize(
    ("cluster", "signs"),
    [
        ("h100-8x", ["--account=", "--partition=", "--qos=", "--exclusive", "--mem=0"]),
        ("a100-4x", ["--constraint=a100_80gb", "--gres=gpu:a100:4", "module load python/3.11"]),
        (
            "h200-8x",
            ["srun", "--container-image=", "--container-mounts=", "/opt/pgm-scale/bin/python -u -m submitit"],
        ),
        (
            "a100-80gb-8x",
            ["apptainer exec --nv --no-home", "pgm-scale.sif /opt/pgm-scale/bin/python -u -m submitit"],
        ),
        ("aws-p5-8x", ["export FI_PROVIDER=efa", "ofi-nccl", "--exclusive"]),
        ("gcp-a3-mega-8x", ["--ntasks-per-node=1", "NCCL_SOCKET_IFNAME=", "--cpus-per-task=96"]),
    ],
)
def test_a_style_shows_in_its_text(cluster, signs, expected):
    text = expected[f"style-{cluster}"]
    assert [sign for sign in signs if sign not in text] == []
    if cluster in ("aws-p5-8x", "gcp-a3-mega-8x"):
        assert "--account" not in text
        assert "--mem" not in text
