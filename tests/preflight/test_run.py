"""The whole preflight on real gloo ranks, each a node of its own or two on one, with faults of every kind."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pgm_scale import config as configuration
from pgm_scale.cli import main
from pgm_scale.config import RunConfig
from pgm_scale.parallel.launch import free_port
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.preflight import network
from pgm_scale.preflight.judgement import Limits, RankReport
from pgm_scale.preflight.run import Options, Probes, examine_ranks
from tests.distributed import run_ranks
from tests.tiny_data import tiny_config, write_tiny_data

# The network's rates are real here, and mean little on a busy machine.
LIMITS = Limits(matmul=0.85, link=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def _examine(
    mesh: Mesh, config: RunConfig | None, shared_memory: Path, ranks_per_node: int, **changes: object
) -> list[RankReport]:
    """On node0, node1, ...; `changes` are what this rank's machine answers."""
    os.environ["SLURMD_NODENAME"] = f"node{mesh.rank // ranks_per_node}"
    sound: dict = {
        "versions": lambda device: {"torch": "2.15"},
        "matmul_flops_per_s": lambda device: 1e12,
        "shared_memory": shared_memory,
    }
    hashes = bool(changes.pop("hashes", False))
    return examine_ranks(mesh, config, Options(hashes=hashes), LIMITS, Probes(**sound | changes))


def _bad(reports: list[RankReport]) -> set[tuple[str, str]]:
    return {(r.place.node, row.check) for r in reports for row in r.rows if row.status == "bad"}


def test_sound_nodes(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "deep" / "run")
    (tmp_path / "deep").mkdir()
    (tmp_path / "shm").mkdir()
    reports = run_ranks(4, _examine, config, tmp_path / "shm", 2)
    assert _bad(reports) == set()
    assert [r.place.node for r in reports] == ["node0", "node0", "node1", "node1"]
    seen = [[(group.scope, group.nodes, group.ranks) for group in r.all_reduces] for r in reports]
    for rank, groups in enumerate(seen):
        both = ("node0", "node1")
        assert groups == [("node", (f"node{rank // 2}",), 2), ("pair", both, 4), ("all", both, 4)]
    assert all(group.exact and group.bytes_per_s > 0 for r in reports for group in r.all_reduces)
    assert [r.clock is not None for r in reports] == [True, False, True, False]
    assert reports[2].clock is not None
    assert abs(reports[2].clock.offset_s) <= reports[2].clock.bound_s
    checks = {row.check for row in reports[0].rows}
    assert {"memory", "run folder", "data", "clock", "matmul", "all-reduce inside", "all-reduce"} <= checks
    assert list((tmp_path / "deep").iterdir()) == []  # no run folder, no token, no trial file


def _faulty_machines(mesh: Mesh, shared_memory: Path) -> list[RankReport]:
    """Node 1 is slow, node 2 has another torch, node 3's clock is off, and node 4's sums are."""

    def off_by_one(tensor: torch.Tensor, group: object) -> None:
        network.all_reduce(tensor, group)
        tensor[-1] += 1

    changes: dict[int, dict[str, object]] = {
        1: {"matmul_flops_per_s": lambda device: 0.6e12},
        2: {"versions": lambda device: {"torch": "2.14"}},
        3: {"clock_s": lambda: time.time() + 100},
        4: {"all_reduce": off_by_one},
    }
    return _examine(mesh, None, shared_memory, 1, **changes.get(mesh.rank, {}))


def test_each_faulty_node_is_named_for_its_own_fault(tmp_path: Path) -> None:
    reports = run_ranks(5, _faulty_machines, tmp_path)
    assert _bad(reports) == {
        ("node1", "matmul"),
        ("node2", "torch"),
        ("node3", "clock"),
        ("node4", "all-reduce between"),
    }
    assert reports[3].clock is not None
    assert reports[3].clock.offset_s == pytest.approx(100, abs=0.5)


def _faulty_folders(mesh: Mesh, data: Path, tmp_path: Path) -> list[RankReport]:
    """Node 1 has another run folder, node 2 lacks a shard, and node 3 has dead files and a probe that fails."""
    config = tiny_config(tmp_path / "partial" if mesh.rank == 2 else data, tmp_path / "run")
    if mesh.rank == 1:
        config = dataclasses.replace(config, folder=str(tmp_path / "elsewhere" / "run"))

    def fails(device: torch.device) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    changes: dict[str, object] = {"matmul_flops_per_s": fails} if mesh.rank == 3 else {}
    shared_memory = tmp_path / ("left" if mesh.rank == 3 else "empty")
    return _examine(mesh, config, shared_memory, 1, **changes)


def test_folders_and_data_that_a_node_does_not_see(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "partial")
    missing = sorted((tmp_path / "partial" / "train").glob("*.mds"))[-1]
    missing.unlink()
    cut = sorted((tmp_path / "partial" / "validation").glob("*.mds"))[0]
    cut.write_bytes(cut.read_bytes()[:-1])
    for folder in ("run", "elsewhere/run", "empty", "left"):
        (tmp_path / folder).mkdir(parents=True)
    left = tmp_path / "left" / "deepspeed_allreduce_buffer_0"
    left.write_bytes(b"")
    os.utime(left, (1, 1))
    reports = run_ranks(4, _faulty_folders, data, tmp_path)
    assert _bad(reports) == {("node1", "run folder"), ("node2", "data"), ("node3", "matmul")}
    told = [row.value for row in reports[2].rows if row.check == "data"]
    assert any(missing.name in text for text in told)
    assert any(cut.name in text and "bytes" in text for text in told)
    assert any(row.check == "leftovers" and left.name in row.value for row in reports[3].rows)
    assert any("illegal memory access" in row.value for row in reports[3].rows)
    assert list((tmp_path / "run").iterdir()) == []


def _hashed(mesh: Mesh, data: Path, copy: Path, run: Path) -> list[RankReport]:
    config = tiny_config(copy if mesh.rank == 2 else data, run)
    return _examine(mesh, config, run.parent, 2, hashes=True)


def test_hashes_are_shared_by_the_ranks_of_a_node_and_name_the_flipped_shard(
    data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "copy")
    shards = sorted((tmp_path / "copy").glob("*/*.mds"))
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    reports = run_ranks(3, _hashed, data, tmp_path / "copy", tmp_path / "run")
    assert _bad(reports) == {("node1", "hashes")}
    named = [row.value for row in reports[2].rows if row.check == "hashes"]
    assert len(named) == len(shards) == 4
    assert all(any(str(shard) in text for text in named) for shard in shards)
    (first,), (second,) = ([row for row in r.rows if row.check == "hashes"] for r in reports[:2])
    assert (first.value, second.value) == ("3 files as they should be", "3 files as they should be")


def _start(rank: int, port: int, *arguments: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "SLURMD_NODENAME": f"node{rank}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pgm_scale.cli", "doctor", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_names_a_node_that_cannot_read_the_configuration(data: Path, tmp_path: Path) -> None:
    config, found = tmp_path / "config.yaml", tmp_path / "preflight.json"
    config.write_text(configuration.to_yaml(tiny_config(data, tmp_path / "run")))
    port = free_port()
    ranks = [
        _start(0, port, str(config), "--cluster", "--json", str(found)),
        _start(1, port, str(tmp_path / "absent.yaml"), "--cluster"),
    ]
    (output, errors), (other_output, other_errors) = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 0], errors + other_errors
    assert "node1: configuration: cannot read the configuration" in errors
    assert "Traceback" not in errors
    assert "node0" in output
    assert other_output == ""
    tree = json.loads(found.read_text())
    assert tree["verdict"] == "bad"
    assert tree["bad_nodes"] == ["node1"]
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_stopped_is_named_and_its_node_excluded(data: Path, tmp_path: Path) -> None:
    config, found, port = tmp_path / "config.yaml", tmp_path / "preflight.json", free_port()
    config.write_text(
        configuration.to_yaml(tiny_config(data, tmp_path / "run", parallel={"timeout_s": 10.0}))
    )
    arguments = (str(config), "--cluster", "--json", str(found))
    ranks = [_start(rank, port, *arguments) for rank in range(2)]
    deadline_s = time.monotonic() + 100
    # Rank 0 writes the nodes as soon as it knows them; the checks after that take longer than a look at the file.
    while not (found.exists() and json.loads(found.read_text())["nodes"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    ranks[1].send_signal(signal.SIGSTOP)
    errors = ranks[0].communicate(timeout=120)[1]
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 4, errors
    assert "rank 1 (host" in errors
    assert "is stopped by a signal" in errors
    tree = json.loads(found.read_text())
    assert (tree["verdict"], tree["bad_nodes"]) == ("unfinished", ["node1"])
    assert "is stopped by a signal" in tree["hang"]


def test_a_configuration_that_no_rank_can_use_is_one_message(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["doctor", str(tmp_path / "absent.yaml"), "--cluster"]) == 2
    assert "cannot read the configuration" in capsys.readouterr().err
    tree = yaml.safe_load(configuration.to_yaml(tiny_config(data, tmp_path / "run"))) | {"nonsense": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    found = tmp_path / "found.json"
    found.write_text('{"verdict": "ok"}')  # of an earlier run
    assert main(["doctor", str(tmp_path / "config.yaml"), "--cluster", "--json", str(found)]) == 2
    assert "nonsense: unknown key" in capsys.readouterr().err
    assert json.loads(found.read_text())["verdict"] == "unfinished"


def test_options_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--json", "x.json"]) == 2
    assert "add --cluster" in capsys.readouterr().err
    assert main(["doctor", "--cluster", "--json", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "--cluster", "--slow-fraction", "1.5"])
    assert "above 0 and below 1" in capsys.readouterr().err


def test_data_that_does_not_fit_is_told_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(configuration.to_yaml(tiny_config(data, tmp_path / "run")))
    (tmp_path / "run").write_text("in the way")
    assert main(["doctor", str(config), "--cluster"]) == 2
    errors = capsys.readouterr().err
    assert "run folder" in errors
    assert "Traceback" not in errors
