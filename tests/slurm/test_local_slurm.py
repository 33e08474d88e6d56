"""What launches rely on, seen on the real Slurm: tasks on both nodes, requeue, signals, a node lost and back."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ops.slurm_local.cluster import LocalSlurm, local_slurm
from ops.slurm_local.configuration import Settings
from pgm_scale.errors import UserError

# Every task says where it runs, in which start of the job, and the signals it gets; USR2 ends it as after a save.
JOB = """#!/bin/bash
trap : TERM
task='trap "echo $SLURM_PROCID got USR2; exit 75" USR2
trap "echo $SLURM_PROCID got TERM; exit 76" TERM
echo task $SLURM_PROCID on $SLURMD_NODENAME, restarts ${SLURM_RESTART_COUNT:-none}
[ ${SLURM_RESTART_COUNT:-0} -gt 0 ] && exit 0
while :; do sleep 0.1; done'
srun bash -c "$task"
echo srun ended with $?
"""


def until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


class Job:
    def __init__(self, slurm: LocalSlurm, folder: Path, *options: str) -> None:
        self.output = folder / "job.log"
        files = (f"--output={self.output}", "--open-mode=append")
        self.slurm = slurm
        self.id = slurm.submit(JOB, "--nodes=2", "--ntasks-per-node=2", *files, *options)

    def lines(self) -> list[str]:
        return self.output.read_text().splitlines() if self.output.exists() else []

    def wait_for(self, *lines: str) -> None:
        until(lambda: set(lines) <= set(self.lines()))

    def wait_until_started(self, restarts: str = "none") -> None:
        nodes = ("node1", "node1", "node2", "node2")
        self.wait_for(*(f"task {task} on {node}, restarts {restarts}" for task, node in enumerate(nodes)))

    def wait_until_in(self, state: str) -> None:
        until(lambda: self.slurm.job_state(self.id) == state)


def test_requeue_starts_the_job_again_and_counts(slurm: LocalSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path)
    job.wait_until_started()
    slurm.run("scontrol", "requeue", job.id)
    job.wait_for(*(f"{task} got TERM" for task in range(4)))
    assert slurm.job(job.id)["Restarts"] == "1"
    job.wait_until_started(restarts="1")
    job.wait_until_in("COMPLETED")


def test_the_signal_before_the_time_limit_reaches_all_tasks_and_not_the_script(
    slurm: LocalSlurm, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "--time=1", "--signal=USR2@59")
    job.wait_for(*(f"{task} got USR2" for task in range(4)), "srun ended with 75")
    job.wait_until_in("COMPLETED")
    assert not any("TERM" in line for line in job.lines())


def test_a_node_set_down_requeues_its_job_which_waits_for_the_node(slurm: LocalSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path)
    job.wait_until_started()
    slurm.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    try:
        job.wait_for("0 got TERM", "1 got TERM")
        job.wait_until_in("PENDING")
        assert slurm.node_states()["node2"].startswith("down")
    finally:
        until(
            lambda: not slurm.processes("node2")[1:]
        )  # of the old tasks Slurm says nothing; they are killed
        slurm.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    job.wait_until_started(restarts="1")
    job.wait_until_in("COMPLETED")


def test_urgent_preempts_main_after_its_grace(slurm: LocalSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--exclusive")
    job.wait_until_started()
    urgent = slurm.submit(
        "#!/bin/sh\n", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"
    )
    job.wait_for(*(f"{task} got TERM" for task in range(4)))
    until(lambda: slurm.job_state(urgent) == "COMPLETED")
    slurm.run("scancel", job.id)


def test_stop_leaves_no_process_of_it_even_when_half_dead(tmp_path: Path) -> None:
    with local_slurm(tmp_path / "slurm", Settings(nodes=1)) as cluster:
        task = "trap '' TERM; sleep 300; sleep 300"
        stubborn = f'#!/bin/bash\ntrap "" TERM\nsetsid sleep 300 &\nsrun bash -c "{task}"\n'
        job = cluster.submit(stubborn, f"--output={tmp_path}/job.log")
        until(lambda: cluster.job_state(job) == "RUNNING")
        until(lambda: sum(one.name() == "sleep" for one in cluster.processes()) == 2)
        of_the_job = cluster.processes()
        # A user's own shell that uses this Slurm.
        bystander = subprocess.Popen(["sleep", "300"], env=cluster.environment)
        try:
            with pytest.raises(UserError, match=f"runs already in {cluster.folder}"):
                cluster.start(Settings(nodes=1))
            next(one for one in cluster.processes() if one.name() == "slurmctld").kill()
            assert cluster.stop()
            assert not any(one.is_running() and one.status() != "zombie" for one in of_the_job)
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()
        assert not cluster.stop()
        assert (cluster.folder / "logs" / "slurmctld.log").exists()


def test_a_node_that_loses_power_is_noticed_and_comes_back(tmp_path: Path) -> None:
    with local_slurm(tmp_path / "slurm", Settings(node_timeout_s=5)) as cluster:
        cluster.kill_node("node2")
        assert not cluster.processes("node2")
        until(lambda: cluster.node_states()["node2"] == "down*")
        cluster.start_node("node2")
        until(lambda: cluster.node_states() == {"node1": "idle", "node2": "idle"})


def test_a_daemon_that_does_not_come_up_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurmctld").write_text("#!/bin/sh\necho no luck today\nexit 1\n")
    (tmp_path / "slurmctld").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = LocalSlurm(tmp_path / "slurm")
    with pytest.raises(UserError, match=r"slurmctld ended; .*slurmctld.out ends with: no luck today"):
        cluster.start(Settings())
    assert not cluster.processes()
