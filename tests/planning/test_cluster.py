from pathlib import Path

import pytest
import yaml

from pgm_scale.errors import UserError
from pgm_scale.planning.cluster import load_hardware

CLUSTERS = [path for path in sorted(Path("configs/clusters").glob("*.yaml")) if "local" not in path.stem]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_shipped_files_are_read(path):
    hardware = load_hardware(path)
    assert hardware.gpus_per_node == int(path.stem.split("-")[-1].removesuffix("x"))
    assert hardware.usable_bytes < hardware.memory_bytes
    assert hardware.inter_node.bytes_per_s < hardware.intra_node.bytes_per_s < hardware.memory_bytes_per_s
    assert hardware.peak("fp32") < hardware.peak("bf16")


def test_other_sections_are_another_readers(tmp_path):
    content = yaml.safe_load(CLUSTERS[0].read_text()) | {"slurm": {"partition": "gpu"}}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_hardware(path) == load_hardware(CLUSTERS[0])


def test_every_problem_is_told_at_once(tmp_path):
    content = yaml.safe_load(CLUSTERS[0].read_text())
    content["hardware"] |= {"matmul_fraction": 1.5, "memory_bytes": 0}
    content["hardware"]["intra_node"]["latency_s"] = -1.0
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        load_hardware(path)
    for name in ("hardware.matmul_fraction", "hardware.memory_bytes", "hardware.intra_node.latency_s"):
        assert name in str(caught.value)
    assert "3 problem(s)" in str(caught.value)


def test_a_file_without_hardware_names_what_is_missing(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("slurm: {partition: gpu}\n")
    with pytest.raises(UserError, match=r"hardware\.gpus_per_node: required"):
        load_hardware(path)
