import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.after import Attempt, decide, exclude_bad_nodes, newest_step

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


def test_after_a_preflight(tmp_path: Path) -> None:
    report = tmp_path / "preflight.json"
    assert exclude_bad_nodes(report, ["8"], 0).commands == ()
    assert exclude_bad_nodes(report, ["8", "9"], 2).commands == ("scancel 8", "scancel 9")
    report.write_text(json.dumps({"bad_nodes": ["gpu3", "gpu7"]}))
    assert exclude_bad_nodes(report, ["8"], 2).commands == ("scontrol update JobId=8 ExcNodeList=gpu3,gpu7",)
    report.write_text(json.dumps({"bad_nodes": ["gpu3; rm -rf /"]}))
    assert exclude_bad_nodes(report, ["8"], 2).commands == ("scancel 8",)


def test_as_the_batch_script_calls_it(tmp_path: Path) -> None:
    """Twice without a new checkpoint where one restart is allowed; the reasons go to stderr, commands to stdout."""
    (tmp_path / "7_job.json").write_text(
        json.dumps({"words": ["train"], "run_folder": str(tmp_path / "run")})
    )

    def call(restart: int) -> tuple[str, str]:
        command = [
            sys.executable,
            "-m",
            "launchers.after",
            str(tmp_path),
            "--exit-code",
            "137",
            "--state",
            RUNNING,
        ]
        environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
        done = subprocess.run(
            [*command, "--restarts", "1"], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout, done.stderr

    assert call(0) == ("scontrol requeue 7\n", "7: requeued after exit code 137\n")
    output, reason = call(1)
    assert output == ""
    assert "2 attempts in a row ended" in reason
    lines = [json.loads(line) for line in (tmp_path / "7_attempts.jsonl").read_text().splitlines()]
    assert [(line["restart"], line["code"], line["step"]) for line in lines] == [(0, 137, -1), (1, 137, -1)]
