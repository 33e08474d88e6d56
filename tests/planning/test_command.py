"""`pgm-scale plan` as a user meets it."""

import json

import pytest
import torch
import yaml

from pgm_scale import config as configuration
from pgm_scale.cli import main
from pgm_scale.parallel.layout import layout_problems
from tests.tiny_data import LENGTH, VOCABULARY, tiny_config, write_tiny_data
from tests.tiny_images import vq_config, write_blobs


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    data = write_tiny_data(tmp_path / "data")
    path.write_text(
        configuration.to_yaml(tiny_config(data, tmp_path / "run", training={"global_batch_sequences": 32}))
    )
    return str(path)


@pytest.fixture
def cluster(tmp_path):
    def write(**changes):
        tree = configuration.read_yaml("configs/clusters/h100-8x.yaml")
        tree["hardware"] |= {"gpus_per_node": 2} | changes
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return write


def test_a_plan_can_be_pasted(config, cluster, tmp_path, capsys):
    out = tmp_path / "plans.json"
    assert (
        main(["plan", config, "--cluster", cluster(), "--gpus", "4", "--top", "3", "--json", str(out)]) == 0
    )
    printed = capsys.readouterr().out
    pasted = yaml.safe_load(printed[printed.index("parallel:\n") :])
    tree = configuration.read_yaml(config)
    for section, values in pasted.items():
        tree[section] |= values
    path = tmp_path / "pasted.yaml"
    path.write_text(yaml.safe_dump(tree))
    run = configuration.load(path)
    assert layout_problems(run, 4) == []

    record = json.loads(out.read_text())
    assert len(record["plans"]) == 3
    assert record["plans"][0]["settings"] == pasted
    assert (record["workload"]["length"], record["workload"]["vocab_size"]) == (LENGTH, VOCABULARY.size)
    steps = [plan["step_s"] for plan in record["plans"]]
    assert steps == sorted(steps)
    for plan in record["plans"]:
        assert plan["dry_build"]["problems"] == []
        assert sum(plan["memory"].values()) == pytest.approx(plan["memory_total_bytes"])
        assert plan["memory_total_bytes"] + plan["free_bytes"] == pytest.approx(80e9)
    for words in (
        "Assumed: matrix products at 65%",
        "Layouts that fit",
        "Memory of the fullest rank",
        "TP1 PP1",
    ):
        assert words in printed


def test_overrides_of_other_plans_are_overrides(config, cluster, capsys):
    assert main(["plan", config, "--cluster", cluster(), "--gpus", "4", "--top", "4"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:3] in ("2: ", "3: ", "4: ")]
    assert len(lines) == 3
    for line in lines:
        assert layout_problems(configuration.load(config, line[3:].split()), 4) == []


def test_nothing_fits(config, cluster, capsys):
    path = cluster(memory_bytes=7.2e9)
    arguments = [
        "plan",
        config,
        "--cluster",
        path,
        "--gpus",
        "1",
        "model.hidden_size=2048",
        "model.num_heads=16",
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nothing fits: on 1 GPUs the smallest layout (TP1 PP1 DP1")
    assert "more than the 2.2 there are" in error
    assert "--gpus 2, the fewest of its doublings" in error
    assert "GPUs with" in error


def test_without_data_the_shape_is_asked_for_or_given(config, cluster, capsys):
    missing = ["plan", config, "data.train=nowhere", "--cluster", cluster()]
    assert main(missing) == 2
    assert "or give --length and --vocab-size" in capsys.readouterr().err
    assert main([*missing, "--length", "32", "--vocab-size", "50", "--top", "1"]) == 0
    assert "sequences of 32 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "nowhere.yaml"], "nowhere.yaml"),
        (["--gpus", "3"], "give whole nodes of 2 GPUs"),
        (["--gpus", "1024"], "cannot be divided over 1024 GPUs by any layout"),
        (["--json", "/nowhere/plans.json"], "give a file in a folder that can be written"),
    ],
)
def test_bad_input_is_one_message(config, cluster, capsys, arguments, message):
    assert main(["plan", config, "--cluster", cluster(), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_without_the_source_tree_a_cluster_is_asked_for(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", config]) == 2
    error = capsys.readouterr().err
    assert error.startswith("no cluster file configs/clusters/h100-8x.yaml here; give --cluster FILE.yaml")
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures units on a GPU")
def test_measuring_needs_a_gpu(config, cluster, capsys):
    assert main(["plan", config, "--cluster", cluster(), "--measure"]) == 2
    assert "this machine has none" in capsys.readouterr().err


def test_a_vq_model_is_not_planned(cluster, tmp_path, capsys):
    data = write_blobs(tmp_path / "blobs")
    path = tmp_path / "vq.yaml"
    path.write_text(configuration.to_yaml(vq_config(data, tmp_path / "run")))
    assert main(["plan", str(path), "--cluster", cluster(), "--gpus", "2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "model.kind vq: only transformers are planned" in line
