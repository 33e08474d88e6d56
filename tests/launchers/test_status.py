"""States of jobs from Slurm, from the files of a job that it has forgotten, and both in a table."""

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.records import read_launches
from launchers.slurm import JobView, parse_job
from launchers.status import JobStatus, describe_exit, job_statuses, worth_showing
from pgm_scale.watching.heartbeat import Heartbeat
from tests.launchers.fake_slurm import add_launch, job_line

BEAT = Heartbeat(
    run="owt",
    state="training",
    step=120,
    total_steps=1000,
    unix_time_s=5.0,
    started_unix_time_s=1.0,
    timeout_s=600.0,
    ranks=4,
    restarts=0,
    host="node1",
    pid=7,
    loss=3.21,
)


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Of the run `owt`, with job 12."""
    folder = tmp_path / "owt" / "jobs"
    add_launch(folder, "12")
    return folder


def _view(jobs: Path, *arguments: Any, **changes: Any) -> JobView:
    (view,) = parse_job(job_line(12, *arguments, **{"stdout": f"{jobs}/12_0_log.out"} | changes))
    return view


def _status(jobs: Path, view: JobView | None) -> JobStatus:
    (status,) = job_statuses(read_launches(jobs), {} if view is None else {view.id: view})
    return status


def _write(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree))


def _write_exit(jobs: Path, task: int, code: int, restart: int = 0, job: str = "12") -> None:
    _write(jobs / f"{job}_{task}_exit.json", {"code": code, "restart": restart, "unix_time_s": 1.0})


def _write_attempts(jobs: Path, *attempts: tuple[int, int]) -> None:
    trees = [{"restart": restart, "code": code, "step": 5, "unix_time_s": 1.0} for restart, code in attempts]
    (jobs / "12_attempts.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))


@pytest.mark.parametrize(
    ("line", "state", "reason"),
    [
        ({"state": "RUNNING"}, "RUNNING", ""),
        ({"state": "RUNNING", "restarts": 2}, "RUNNING", ""),
        (
            {
                "state": "PENDING",
                "reason": "Dependency",
                "dependency": "afterok:10_*(unfulfilled),afterany:11(failed)",
            },
            "PENDING",
            "waits for job 10_*, 11",
        ),
        (
            {"state": "PENDING", "reason": "DependencyNeverSatisfied", "dependency": "afterok:11(failed)"},
            "PENDING",
            "never starts: job 11 did not end well; cancel it",
        ),
        ({"state": "PENDING", "reason": "Resources"}, "PENDING", "waits for free nodes"),
        ({"state": "PENDING", "reason": "QOSMaxJobsPerUserLimit"}, "PENDING", "QOSMaxJobsPerUserLimit"),
        (
            {"state": "PENDING", "reason": "Nodes_required_for_job_are_DOWN"},
            "PENDING",
            "Nodes required for job are DOWN",
        ),
        ({"state": "PENDING", "reason": "None"}, "PENDING", ""),
        (
            {"state": "PENDING", "reason": "BeginTime", "restarts": 1, "start": "2026-11-22T15:42:24"},
            "REQUEUED",
            "starts at 15:42:24 or later",
        ),
        ({"state": "CANCELLED", "reason": "BeginTime", "restarts": 1}, "CANCELLED", ""),
        ({"state": "FAILED", "reason": "NonZeroExitCode", "exit": "2:0"}, "FAILED", "exit code 2: bad input"),
        ({"state": "FAILED", "reason": "NonZeroExitCode", "exit": "9:0"}, "FAILED", "exit code 9"),
        ({"state": "FAILED", "reason": "NonZeroExitCode", "exit": "0:9"}, "FAILED", "killed by signal 9"),
        ({"state": "FAILED", "reason": "RaisedSignal:53(Real-time)"}, "FAILED", "RaisedSignal:53(Real-time)"),
        ({"state": "TIMEOUT", "reason": "TimeLimit"}, "TIMEOUT", "the time limit was reached"),
        ({"state": "NODE_FAIL"}, "NODE_FAIL", "a node failed"),
    ],
)
def test_what_slurm_says_in_words(jobs: Path, line: dict[str, Any], state: str, reason: str) -> None:
    _write_exit(jobs, 0, 4)  # of an earlier start: Slurm knows better
    status = _status(jobs, _view(jobs, **line))
    assert (status.state, status.reason) == (state, reason)


def test_numbers_of_a_running_job(jobs: Path) -> None:
    (jobs.parent / "heartbeat.json").write_bytes(BEAT.to_bytes())
    status = _status(jobs, _view(jobs, restarts=3))
    assert (status.restarts, status.nodes, status.node_list) == (3, 2, "node[1-2]")
    assert (status.run_s, status.time_left_s, status.exit_code) == (6, 594, None)
    assert status.heartbeat == BEAT


def test_the_same_id_of_another_job_is_not_this_one(jobs: Path) -> None:
    """Slurm counts from 1 again after it lost its state; submitit's folder tells jobs apart."""
    _write_exit(jobs, 0, 0)
    status = _status(jobs, _view(jobs, "RUNNING", stdout="/home/user/runs/other/jobs/12_0_log.out"))
    assert (status.state, status.exit_code) == ("COMPLETED", 0)


@pytest.mark.parametrize(
    ("codes", "attempts", "state", "reason"),
    [
        ([0, 0], [], "COMPLETED", ""),
        ([0, 3], [], "FAILED", "exit code 3: a loss or gradient that is not finite, or a spike"),
        ([4, 137], [], "FAILED", "exit code 137: killed by signal 9"),
        ([0, 0], [(0, 0)], "COMPLETED", ""),
        ([0, 0], [(0, 143)], "FAILED", "exit code 143: killed by signal 15"),
        ([0, 0], [(0, 75), (1, 75), (2, 4)], "FAILED", "exit code 4: a rank hung or died"),
    ],
)
def test_a_job_that_slurm_has_forgotten(
    jobs: Path, codes: list[int], attempts: list[tuple[int, int]], state: str, reason: str
) -> None:
    for task, code in enumerate(codes):
        _write_exit(jobs, task, code)
    if attempts:
        _write_attempts(jobs, *attempts)
    status = _status(jobs, None)
    assert (status.state, status.reason, status.has_ended) == (state, reason, True)


def test_tasks_of_a_later_start_than_the_scripts_record(jobs: Path) -> None:
    """The batch script was killed with its node."""
    _write_attempts(jobs, (0, 75))
    _write_exit(jobs, 0, 0, restart=1)
    _write_exit(jobs, 1, 4, restart=0)
    status = _status(jobs, None)
    assert (status.state, status.restarts) == ("COMPLETED", 1)


def test_nobody_knows(jobs: Path) -> None:
    assert _status(jobs, None).reason == "Slurm has forgotten it; it left no sign of a start"
    (jobs / "12_0_log.err").write_text("step 1")
    assert _status(jobs, None).reason == "Slurm has forgotten it; it started, but left no exit code"
    _write_exit(jobs, 0, 75)
    status = _status(jobs, None)
    assert status.reason == (
        "Slurm has forgotten it; start 1 ended with exit code 75: stopped by a signal after saving"
    )
    assert (status.state, status.has_ended) == ("UNKNOWN", True)


def test_where_slurm_cannot_be_asked(jobs: Path) -> None:
    def status() -> JobStatus:
        return job_statuses(read_launches(jobs), None)[0]

    assert (status().state, status().has_ended) == ("UNKNOWN", False)
    _write_exit(jobs, 0, 4)  # after which it is requeued
    assert (status().state, status().has_ended) == ("UNKNOWN", False)
    assert "Slurm cannot be asked" in status().reason
    _write_exit(jobs, 1, 2, restart=1)
    assert (status().state, status().has_ended) == ("FAILED", True)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', '{"code": "many"}', '{"code": 0}', "\udcff"])
def test_damaged_files_are_no_news(jobs: Path, content: str) -> None:
    for name in ("12_0_exit.json", "12_attempts.jsonl", "../heartbeat.json"):
        (jobs / name).write_text(content, errors="surrogateescape")
    status = _status(jobs, None)
    assert (status.state, status.heartbeat) == ("UNKNOWN", None)


def test_tasks_of_an_arrays_jobs_are_not_the_jobs_own(jobs: Path) -> None:
    """12_0_exit.json is of job 12, and 12_0_1_exit.json of job 12_0."""
    _write_exit(jobs, 1, 0, job="12_0")
    assert _status(jobs, None).state == "UNKNOWN"


def test_the_heartbeat_is_that_of_the_newest_job(jobs: Path) -> None:
    (jobs.parent / "heartbeat.json").write_bytes(BEAT.to_bytes())
    add_launch(jobs, "15")
    first, second = job_statuses(read_launches(jobs), {})
    assert first.heartbeat is None
    assert second.heartbeat == BEAT


def test_what_is_shown_without_being_asked_for(jobs: Path) -> None:
    add_launch(jobs, "13")
    add_launch(jobs, "14")
    _write_exit(jobs, 0, 0)
    _write_exit(jobs, 0, 2, job="14")
    shown = [launched.record.job_id for launched in worth_showing(read_launches(jobs))]
    assert shown == ["13", "14"]  # 13 may still wait or run


@pytest.mark.parametrize(
    ("code", "words"),
    [(75, "stopped by a signal after saving"), (137, "killed by signal 9"), (42, "exit code 42")],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert words in describe_exit(code)
