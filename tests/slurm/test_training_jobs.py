"""Trainings on a real Slurm of two nodes with two tasks each: they go on, whatever stops them."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.after import newest_step
from ops.slurm_local.cluster import LocalSlurm
from tests.slurm.jobs import (
    CLUSTER,
    ROOT,
    Cluster,
    Job,
    assert_holds_no_secret,
    assert_same_training,
    records,
    tracker_runs,
    training_words,
)

LAST_STEP, SAVE_INTERVAL = 100, 20
TRACKED = "tracking.wandb=offline"
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def cluster(slurm: LocalSlurm, folder: Path) -> Cluster:
    return Cluster(slurm, folder)


@pytest.fixture(autouse=True)
def leave_nothing(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.clear()


@pytest.fixture(scope="module")
def data(cluster: Cluster, folder: Path) -> Path:
    cluster.pgm_scale("prepare", "python-docs", "--format", "tar", "--output", str(folder / "data"))
    return folder / "data"


@pytest.fixture(scope="module")
def reference(cluster: Cluster, data: Path, folder: Path) -> Path:
    """The run that nothing has stopped."""
    job = cluster.train(data, folder / "reference")
    job.wait_until_finished()
    assert job.restarts == 0
    return job.run


def finished(job: Job, reference: Path, timeout_s: float = 300) -> None:
    """The job has gone on to its end, as one run for the tracker and for anyone who compares."""
    job.wait_until_finished(timeout_s)
    assert_same_training(job.run, reference)
    assert_holds_no_secret(job.run)


def test_the_uninterrupted_run(reference: Path) -> None:
    assert records(reference)[-1]["step"] == LAST_STEP
    assert_holds_no_secret(reference)


@pytest.mark.fault(11)
def test_time_limit(cluster: Cluster, data: Path, folder: Path, reference: Path) -> None:
    """Slurm looks every 30 s for jobs that near their end: USR2 comes 30 to 60 s after the start, until it ends.

    The job takes longer than that.
    """
    path = folder / "minute.yaml"
    path.write_text(CLUSTER.read_text().replace("signal_before_s: 30", "signal_before_s: 60"))
    job = cluster.train(data, folder / "limit", *slow(384), TRACKED, "--cluster", str(path), "--time", "2")
    job.wait_for_step(1)
    job.wait_for_state("PENDING", timeout_s=200)
    assert 0 < job.step < LAST_STEP
    # Once is enough; before the next start, which reads when the job ends.
    cluster.slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    finished(job, reference)
    assert job.restarts == 1
    assert "stopped by a signal" in job.logs
    assert len(tracker_runs(job.run)) == 1


@pytest.mark.fault(12)
@pytest.mark.fault(13)
@pytest.mark.fault(14)
@pytest.mark.fault(15)
def test_one_job_through_signals_a_requeue_and_preemptions(
    cluster: Cluster, data: Path, folder: Path, reference: Path
) -> None:
    """One after the other, and it is still the run that nothing has stopped.

    The signal twice; a requeue without one; a job of a higher partition takes the nodes, of which the tasks are
    told by SIGTERM, or by the signal that the job has asked for; a killed task has left something behind.
    """
    job = cluster.train(data, folder / "through", *slow(64), TRACKED)
    job.wait_for_step(15)
    for task in range(4):
        (job.run / "jobs" / f"{job.id}_{task}_result.save_tmp").touch()
    cluster.slurm.run("scancel", "--signal=USR2", job.id)
    cluster.slurm.run("scancel", "--signal=USR2", job.id)
    job.wait_for_restarts(1)
    assert job.logs.count("requeued after exit code 75") == 1

    wait_for_more_steps(job)
    cluster.slurm.run("scontrol", "requeue", job.id)
    job.wait_for_restarts(2)

    for restart, sends_user_signal in ((3, False), (4, True)):
        wait_for_more_steps(job)
        cluster.slurm.signal_at_preemption(sends_user_signal)
        cluster.slurm.submit(
            "#!/bin/sh\n", "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null"
        )
        job.wait_for_restarts(restart)
        saved = newest_step(str(job.run))
        assert saved >= job.step - SAVE_INTERVAL
        assert f"stopped by a signal after step {saved}" in job.logs
    cluster.slurm.signal_at_preemption(False)
    finished(job, reference)
    assert job.restarts == 4
    assert len(tracker_runs(job.run)) == 1


def slow(sequences: int) -> tuple[str, ...]:
    """A validation after each step, which changes nothing in what is trained."""
    return ("validation.interval_steps=1", f"validation.sequences={sequences}")


def wait_for_more_steps(job: Job) -> None:
    """Until the session that has been started trains."""
    job.wait_for_step(job.step + 5)


@pytest.mark.nightly
def test_sigterm_to_one_task(cluster: Cluster, data: Path, folder: Path, reference: Path) -> None:
    job = cluster.train(data, folder / "term")
    job.wait_for_step(30)
    job.task(2).send_signal(signal.SIGTERM)
    finished(job, reference)
    assert job.restarts == 1
    assert job.logs.count("requeued after exit code 75") == 1


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 3])
def test_kill_of_one_task(cluster: Cluster, data: Path, folder: Path, reference: Path, rank: int) -> None:
    job = cluster.train(data, folder / f"kill-{rank}")
    job.wait_for_step(45)
    job.task(rank).kill()
    finished(job, reference)
    assert job.restarts == 1
    assert f"rank {rank}" in job.logs
    assert "requeued after exit code 137" in job.logs


def test_a_stopped_task_is_named_with_its_stack(
    cluster: Cluster, data: Path, folder: Path, reference: Path
) -> None:
    """Within `parallel.timeout_s` and, as a stopped task cannot end itself, `exit_grace_s` of the cluster."""
    job = cluster.train(data, folder / "stopped", "parallel.timeout_s=15")
    job.wait_for_step(45)
    job.task(3).suspend()
    stopped_s = time.monotonic()
    job.wait_for_restarts(1)
    assert time.monotonic() - stopped_s < 15 + 20 + 25
    assert "rank 3" in job.logs
    assert "is stopped" in job.logs
    stacks = (job.run / "hangs" / "rank-0.txt").read_text()
    assert "rank 3" in stacks
    assert "training_step" in stacks
    finished(job, reference)


@pytest.mark.nightly
def test_node_down_and_back(cluster: Cluster, data: Path, folder: Path, reference: Path) -> None:
    job = cluster.train(data, folder / "node")
    job.wait_for_step(45)
    cluster.slurm.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    job.wait_for_state("PENDING")
    cluster.slurm.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    finished(job, reference)
    assert job.restarts == 1


@pytest.mark.nightly
def test_a_preflight_and_what_follows_it(cluster: Cluster, data: Path, folder: Path) -> None:
    """It finds nothing wrong here; the training starts when it has ended."""
    words = [*training_words(data, folder / "after-preflight"), "training.steps=5"]
    preflight, train = cluster.launch(
        *("preflight", words[0], *words[1:], "--cluster", str(CLUSTER)), *("--then", "train", *words)
    )
    job = Job(cluster.slurm, train, folder / "after-preflight")
    job.wait_until_finished()
    report = json.loads((folder / "jobs/preflight/preflight.json").read_text())
    assert report["bad_nodes"] == [], report
    assert set(report["nodes"]) == {"node1", "node2"}
    assert cluster.slurm.job_state(preflight) == "COMPLETED"


@pytest.mark.nightly
def test_a_sweep(cluster: Cluster, data: Path, folder: Path) -> None:
    """One run of the array is told to stop: it alone is requeued, and goes on in its own folder."""
    words = [*training_words(data, folder / "sweep"), "training.steps=60", "training.seed=1,2"]
    ids = cluster.launch("train", *words, "--cluster", str(CLUSTER), "--nodes", "1", "--tasks-per-node", "1")
    jobs = [
        Job(cluster.slurm, job, folder / f"sweep-seed={seed}") for job, seed in zip(ids, (1, 2), strict=True)
    ]
    jobs[1].wait_for_step(10)
    cluster.slurm.run("scancel", "--signal=USR2", jobs[1].id)
    for job in jobs:
        job.wait_until_finished()
        assert [record["step"] for record in records(job.run)] == list(range(1, 61))
    assert [job.restarts for job in jobs] == [0, 1]
    status = cluster.pgm_scale("launch", "status", str(jobs[1].run), "--json")
    assert json.loads(status)[0]["job_id"] == jobs[1].id


def test_a_crash_loop_ends(cluster: Cluster, data: Path, folder: Path) -> None:
    """Killed before its first checkpoint, twice, where one restart is allowed; then the alert command is told."""
    path = folder / "one-restart.yaml"
    path.write_text(CLUSTER.read_text() + "  restarts_without_progress: 1\n")
    alert = f"watching.alert_command=echo $PGM_SCALE_EVENT >> {folder}/alerts"
    job = cluster.train(data, folder / "loop", "--cluster", str(path), "--tasks-per-node", "1", alert)
    for restart in range(2):
        job.wait_for_restarts(restart)
        job.wait_for_step(1)
        job.task(0).kill()
    job.wait_for_state("FAILED")
    assert job.restarts == 1
    assert "2 attempts in a row ended (the last with exit code 137)" in job.logs
    assert (folder / "alerts").read_text().splitlines()[-1] == "crash_loop"


def test_cancelled_is_not_requeued(cluster: Cluster, data: Path, folder: Path) -> None:
    job = cluster.train(data, folder / "cancelled")
    job.wait_for_step(30)
    output = cluster.pgm_scale("launch", "cancel", str(job.run))
    assert job.id in output
    job.wait_for_state("CANCELLED")
    assert job.restarts == 0
    assert "stopped by a signal" in job.logs  # and saved


@pytest.mark.nightly
def test_torchrun_on_each_node(cluster: Cluster, data: Path, folder: Path, reference: Path) -> None:
    path = folder / "torchrun.yaml"
    path.write_text(CLUSTER.read_text() + "  launcher: torchrun\n")
    job = cluster.train(data, folder / "torchrun", "--cluster", str(path))
    job.wait_for_step(30)
    cluster.slurm.run("scancel", "--signal=USR2", job.id)
    finished(job, reference)
    assert job.restarts == 1


@pytest.mark.nightly
def test_a_chain(cluster: Cluster, folder: Path) -> None:
    """Prepared, trained and exported by one command, each after the one before has ended well."""
    data, run, exported = folder / "chain-data", folder / "chain", folder / "exported"
    words = [
        *("prepare", "python-docs", "--format", "tar", "--output", str(data), "--cluster", str(CLUSTER)),
        *(
            "--then",
            "train",
            str(ROOT / "configs/demo.yaml"),
            f"folder={run}",
            f"data.train={data / 'train'}",
        ),
        *(f"data.validation={data / 'validation'}", "training.micro_batch_sequences=4", "training.steps=10"),
        *("--then", "export", str(run), "--out", str(exported)),
    ]
    ids = cluster.launch(*words)
    jobs = [Job(cluster.slurm, job, run) for job in ids]
    assert len(jobs) == 3
    jobs[-1].wait_until_finished()
    assert (exported / "model.safetensors").exists()
