import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.after import Attempt, NextJobs, bad_nodes_of, decide, exclude_bad_nodes, newest_step

RUNNING = "JobId=7 JobName=x UserId=u(1) JobState=RUNNING Reason=None Dependency=(null) Restarts=0"
LIMIT = "JobId=7 JobName=x JobState=COMPLETING Reason=TimeLimit Restarts=0"
CANCELLED = "JobId=7 JobName=x JobState=COMPLETING Reason=None Restarts=0"


def attempts(*steps: int) -> list[Attempt]:
    return [Attempt(index, 75, step, 0.0) for index, step in enumerate(steps)]


@pytest.mark.parametrize("state", [RUNNING, LIMIT])
@pytest.mark.parametrize("code", [75, 4, 1, 137, 143])
def test_requeued(code: int, state: str) -> None:
    assert decide(code, state, "7", attempts(10), 3).commands == ("scontrol requeue 7",)


@pytest.mark.parametrize("code", [0, 2, 3])
def test_ends_that_are_final(code: int) -> None:
    decision = decide(code, RUNNING, "7", attempts(10), 3)
    assert not decision.commands
    assert f"(exit code {code})" in decision.reason


@pytest.mark.parametrize("state", [CANCELLED, "", "JobState=PENDING Reason=BeginTime", "JobState=NODE_FAIL"])
def test_what_slurm_does_itself_is_left_alone(state: str) -> None:
    assert not decide(75, state, "7", attempts(10), 3).commands


@pytest.mark.parametrize(
    ("steps", "requeued"),
    [
        ([-1], True),
        ([-1, -1, -1], True),
        ([-1, -1, -1, -1], False),
        ([5, 5, 5, 5], False),
        ([5, 5, 5, 9], True),
        ([1, 2, 3, 4, 5, 6], True),
        ([1, 9, 9, 9], True),
        ([1, 9, 9, 9, 9], False),
        ([9, 5, 5, 9], True),  # a bad checkpoint was put aside, and its step trained again
    ],
)
def test_a_crash_loop_stops_after_three_restarts_without_a_checkpoint(
    steps: list[int], requeued: bool
) -> None:
    decision = decide(1, RUNNING, "7", attempts(*steps), 3)
    assert bool(decision.commands) is requeued
    assert decision.is_crash_loop is not requeued


def test_the_newest_step_by_names(tmp_path: Path) -> None:
    assert newest_step(None) == -1
    assert newest_step(str(tmp_path)) == -1
    for name in ("step_00000010", "step_00000200", ".step_00000300.saving", "step_x", "LATEST"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(str(tmp_path)) == 200


def test_after_a_preflight() -> None:
    waiting = NextJobs(("8", "9"))
    assert exclude_bad_nodes(["gpu3"], waiting, 0).commands == ()
    assert exclude_bad_nodes([], waiting, 2).commands == ("scancel 8", "scancel 9")
    assert exclude_bad_nodes(["gpu3; rm -rf /"], NextJobs(("8",)), 2).commands == ("scancel 8",)
    assert exclude_bad_nodes(["gpu3", "gpu7"], NextJobs(("8",)), 2).commands == (
        "scontrol update JobId=8 ExcNodeList=gpu3,gpu7",
    )


def test_nodes_that_are_left_out_already_stay_out() -> None:
    (command,) = exclude_bad_nodes(["gpu3"], NextJobs(("8",), "gpu[1-2]"), 2).commands
    assert shlex.split(command)[-1] == "ExcNodeList=gpu[1-2],gpu3"


def test_the_report_of_an_earlier_preflight_is_not_taken(tmp_path: Path) -> None:
    report, job = tmp_path / "preflight.json", tmp_path / "7_job.json"
    report.write_text(json.dumps({"bad_nodes": ["gpu3"]}))
    assert bad_nodes_of(tmp_path, "7") == []  # no task of this job has come to begin one
    job.write_text("{}")
    os.utime(job, (200, 200))
    for changed_s, nodes in ((199, []), (200, ["gpu3"]), (201, ["gpu3"])):
        os.utime(report, (changed_s, changed_s))
        assert bad_nodes_of(tmp_path, "7") == nodes
    report.write_text("[1]")
    assert bad_nodes_of(tmp_path, "7") == []


def _after(folder: Path, *words: str, state: str = RUNNING, **environment: str) -> tuple[str, str]:
    """What the batch script gets to run, and what is said."""
    done = subprocess.run(
        [sys.executable, "-m", "launchers.after", str(folder), "--state", state, "--restarts", "1", *words],
        env=os.environ | {"SLURM_JOB_ID": "7"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


def test_a_preflight_that_slurm_starts_again_cancels_nothing(tmp_path: Path) -> None:
    (tmp_path / "7_next.json").write_text(json.dumps({"ids": ["8"], "exclude": ""}))
    requeued = "JobId=7 JobState=COMPLETING Reason=None Restarts=1"
    assert _after(tmp_path, "--exit-code", "143", state=requeued)[0] == ""
    again = _after(tmp_path, "--exit-code", "143", state=requeued, SLURM_RESTART_COUNT="1")
    assert again[0] == "scancel 8\n"


def test_of_an_array_one_job_is_requeued(tmp_path: Path) -> None:
    """The last job of an array has the array's own number."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert _after(tmp_path, "--exit-code", "75", **array)[0] == "scontrol requeue 7_2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["7_2_attempts.jsonl"]


@pytest.mark.parametrize(
    ("words", "requeued"), [(["train"], True), (["prepare"], True), (["eval"], False), (["doctor"], False)]
)
def test_at_its_time_limit_what_would_begin_anew_is_not_requeued(
    tmp_path: Path, words: list[str], requeued: bool
) -> None:
    (tmp_path / "7_job.json").write_text(json.dumps({"words": words, "run_folder": None}))
    commands, why = _after(tmp_path, "--exit-code", "143", state=LIMIT)
    assert bool(commands) is requeued, why
    (tmp_path / "7_attempts.jsonl").unlink()
    assert _after(tmp_path, "--exit-code", "143")[0] == "scontrol requeue 7\n"  # it was preempted


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    commands, why = _after(tmp_path / "none", "--exit-code", "75")
    assert commands == ""
    assert "not requeued" in why
    assert "Traceback" not in why


def test_a_single_save_is_no_crash_loop() -> None:
    assert decide(75, RUNNING, "7", attempts(10), 0).commands
    assert not decide(75, RUNNING, "7", attempts(10, 10), 0).commands
    assert not decide(1, RUNNING, "7", attempts(10), 0).commands


def test_as_the_batch_script_calls_it(tmp_path: Path) -> None:
    """Twice without a new checkpoint where one restart is allowed; the reasons go to stderr, commands to stdout."""
    (tmp_path / "7_job.json").write_text(
        json.dumps({"words": ["train"], "run_folder": str(tmp_path / "run")})
    )

    def call(restart: int) -> tuple[str, str]:
        return _after(tmp_path, "--exit-code", "137", SLURM_RESTART_COUNT=str(restart))

    assert call(0) == ("scontrol requeue 7\n", "7: requeued after exit code 137\n")
    output, reason = call(1)
    assert output == ""
    assert "2 attempts in a row ended" in reason
    lines = [json.loads(line) for line in (tmp_path / "7_attempts.jsonl").read_text().splitlines()]
    assert [(line["restart"], line["code"], line["step"]) for line in lines] == [(0, 137, -1), (1, 137, -1)]


def test_who_has_ended_the_job_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    requeued = CANCELLED.replace("Restarts=0", "Restarts=1")
    assert decide(75, requeued, "7", attempts(10), 3).reason == "requeued by Slurm itself"
    assert decide(75, CANCELLED, "7", attempts(10), 3).reason.startswith("not requeued: the job is cancelled")
