"""What of the local Slurm can be tested without Slurm; tests/slurm starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ops.slurm_local import daemons
from ops.slurm_local.__main__ import main
from ops.slurm_local.configuration import Settings, slurm_conf
from ops.slurm_local.processes import end_all, find_processes

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command with these words: it must refuse, in the one line that is returned."""

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["slurm_local", *map(str, words)])
        assert main() == 2
        return capsys.readouterr().err

    return call


def test_missing_programs_are_told_with_the_packages(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "_path", lambda: str(tmp_path))
    message = run("start", "--folder", tmp_path / "slurm")
    assert "cannot find munged, slurmctld" in message
    assert "install --no-install-recommends slurm-wlm munge\n" in message
    assert not (tmp_path / "slurm").exists()


@pytest.mark.parametrize("name", ["with space", "a#b", "50%", "x" * 120])
def test_a_folder_whose_name_slurm_cannot_take_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    assert "without spaces" in run("start", "--folder", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_refused_and_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "precious").write_text("work")
    assert "give a new or empty folder" in run("start", "--folder", tmp_path)
    (tmp_path / "file").touch()
    assert "give a new or empty folder" in run("start", "--folder", tmp_path / "file")
    assert (tmp_path / "state" / "precious").read_text() == "work"


def test_status_of_nothing(run: Run, tmp_path: Path) -> None:
    assert f"no Slurm runs in {tmp_path}\n" == run("status", "--folder", tmp_path)


def test_configuration_keeps_to_its_folder_and_gives_every_daemon_a_port(tmp_path: Path) -> None:
    text = slurm_conf(tmp_path, Settings(nodes=3, cpus_per_node=7, grace_s=11, signal_at_preemption=True))
    ports = re.findall(r"Port=(\d+)", text)
    assert len(set(ports)) == len(ports) == 4
    assert re.findall(r"^NodeName=(\w+) .*CPUs=(\d+)", text, re.MULTILINE) == [
        ("node1", "7"),
        ("node2", "7"),
        ("node3", "7"),
    ]
    assert "GraceTime=11 " in text
    assert "\nSlurmctldParameters=preempt_send_user_signal\n" in text
    assert "SlurmctldParameters" not in slurm_conf(tmp_path, Settings())
    # Slurm refuses a key without a value.
    assert not re.search(r"=\s", text)
    assert all(path.startswith(f"{tmp_path}/") for path in re.findall(r"=(/\S+)", text))


@pytest.fixture
def sleeper() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(first: str = ":", **environment: str) -> subprocess.Popen[bytes]:
        command = ["sh", "-c", f"{first}; echo ready; exec sleep 300"]
        environment = {"PATH": "/usr/bin:/bin", **environment}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_tasks_are_told_from_a_users_shell_and_from_other_clusters(
    tmp_path: Path, sleeper: Callable[..., subprocess.Popen[bytes]]
) -> None:
    configuration = tmp_path / "slurm.conf"
    task1 = sleeper(SLURM_CONF=str(configuration), SLURMD_NODENAME="node1")
    task2 = sleeper(SLURM_CONF=str(configuration), SLURMD_NODENAME="node2")
    sleeper(SLURM_CONF=str(configuration))
    sleeper(SLURM_CONF=f"{configuration}2", SLURMD_NODENAME="node1")
    sleeper(SLURMD_NODENAME="node1")
    assert {one.pid for one in find_processes(configuration)} == {task1.pid, task2.pid}
    assert {one.pid for one in find_processes(configuration, "node2")} == {task2.pid}


def test_what_ignores_sigterm_is_killed(
    tmp_path: Path, sleeper: Callable[..., subprocess.Popen[bytes]]
) -> None:
    configuration = tmp_path / "slurm.conf"
    variables = {"SLURM_CONF": str(configuration), "SLURMD_NODENAME": "node1"}
    willing, deaf = sleeper(**variables), sleeper("trap '' TERM", **variables)
    end_all(lambda: find_processes(configuration), patience_s=0.3)
    assert (willing.wait(), deaf.wait()) == (-15, -9)
