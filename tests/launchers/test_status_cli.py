"""`launch status`, `logs` and `cancel` as a user sees them, with Slurm's programs replaced."""

import argparse
import json
import os
from pathlib import Path

import pytest

from launchers import logs
from launchers.cancelling import dependents_of
from launchers.logs import LogTail, follow
from launchers.records import read_launches
from launchers.status_cli import add_status_commands
from launchers.status_table import duration
from pgm_scale.errors import UserError
from tests.launchers.fake_slurm import FakeSlurm, add_launch, job_line


def _launch(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_status_commands(parser.add_subparsers())
    options = parser.parse_args(words)
    options.run(options)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Job 12 trains runs/owt, 13 (evaluation) waits for it, 14 (export) for that one; 11 has ended."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    add_launch(work / "runs/owt/jobs", "11", unix_time_s=1.0)
    add_launch(work / "runs/owt/jobs", "12", unix_time_s=2.0)
    for job, name in (("13", "eval"), ("14", "export")):
        add_launch(
            work / "jobs" / name, job, name=name, command=(name, "runs/owt"), run_folder=None, unix_time_s=3.0
        )
    fake.knows(11, job_line(11, "CANCELLED", stdout=f"{work}/runs/owt/jobs/11_0_log.out"))
    fake.knows(12, job_line(12, stdout=f"{work}/runs/owt/jobs/12_0_log.out"))
    for number, name in ((13, "eval"), (14, "export")):
        fake.knows(
            number,
            job_line(
                number,
                "PENDING",
                name=name,
                reason="Dependency",
                dependency=f"afterok:{number - 1}(unfulfilled)",
                stdout=f"{work}/jobs/{name}/{number}_0_log.out",
            ),
        )
    fake.waiting("13|afterok:12(unfulfilled)\n14|afterok:13(unfulfilled)\n99|afterok:98(unfulfilled)\n")
    return fake


def test_a_line_for_each_job(fake: FakeSlurm, capsys: pytest.CaptureFixture) -> None:
    _launch("status")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["job", "11", "12", "13", "14"]
    assert lines[2].split()[1:4] == ["runs/owt", "train", "RUNNING"]
    assert "node[1-2]" in lines[2]
    assert "9:54" in lines[2]
    assert "PENDING (waits for job 12)" in lines[3]
    assert fake.calls == 1


def test_json_of_one_run(fake: FakeSlurm, capsys: pytest.CaptureFixture) -> None:
    Path("runs/owt/heartbeat.json").write_text(
        '{"run": "owt", "state": "training", "step": 7, "total_steps": 9, "unix_time_s": 1, "ranks": 1, '
        '"loss": NaN, "started_unix_time_s": 1, "timeout_s": 9, "restarts": 0, "host": "node1", "pid": 1}'
    )
    _launch("status", "owt", "--json")
    old, new = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert (old["job_id"], old["state"], old["heartbeat"]) == ("11", "CANCELLED", None)
    assert (new["job_id"], new["state"], new["time_left_s"]) == ("12", "RUNNING", 594)
    assert (new["heartbeat"]["step"], new["heartbeat"]["loss"]) == (7, None)


def test_brackets_are_shown(fake: FakeSlurm, capsys: pytest.CaptureFixture) -> None:
    add_launch(Path("jobs/sample").absolute(), "16", name="sample[bold]", run_folder=None)
    _launch("status", "16")
    assert "sample[bold]" in capsys.readouterr().out


def test_nothing_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    _launch("status")
    _launch("status", "--json")
    said = capsys.readouterr()
    assert "no launched jobs" in said.err
    assert json.loads(said.out) == []


def test_status_without_slurm_reads_the_files(
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Path("runs/owt/jobs/12_0_exit.json").write_text('{"code": 0, "restart": 1, "unix_time_s": 1.0}')
    monkeypatch.setenv("PATH", "")
    _launch("status", "12")
    said = capsys.readouterr()
    assert "no Slurm here" in said.err
    assert "COMPLETED" in said.out


def test_cancelling_a_run_takes_its_dependents_along(fake: FakeSlurm, capsys: pytest.CaptureFixture) -> None:
    _launch("cancel", "runs/owt")
    assert fake.cancelled == [["14", "13"], ["12"]]  # those that wait first, the newest first
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["14", "13", "12"]
    assert "waits for it" in lines[0]
    assert "saves" in lines[2]


def test_cancelling_one_job(fake: FakeSlurm) -> None:
    _launch("cancel", "14")
    _launch("cancel", "owt", "--job", "11")
    assert fake.cancelled == [["14"]]


def test_nothing_to_cancel(fake: FakeSlurm, capsys: pytest.CaptureFixture) -> None:
    _launch("cancel", "owt", "--job", "11")
    assert "nothing to cancel" in capsys.readouterr().err
    with pytest.raises(UserError, match="99: nothing was launched"):
        _launch("cancel", "99")
    assert fake.cancelled == []


def test_a_job_of_another_run_with_the_same_id_is_left_alone(fake: FakeSlurm) -> None:
    fake.knows(12, job_line(12, stdout="/home/user/other/jobs/12_0_log.out"))
    _launch("cancel", "owt")
    assert fake.cancelled == []


def test_dependents_through_arrays_and_rings() -> None:
    needed = {
        "20_0": ("12",),
        "20_1": ("12",),
        "21": ("20",),
        "22": ("21", "99"),
        "30": ("99",),
        "31": ("32",),
        "32": ("31",),
    }
    assert set(dependents_of(["12"], needed)) == {"20_0", "20_1", "21", "22"}
    assert set(dependents_of(["20_1"], needed)) == {"21", "22"}
    assert dependents_of(["31"], needed) == ["32"]
    assert dependents_of([], needed) == []


def _log(job: str, rank: int, kind: str) -> Path:
    return Path(f"runs/owt/jobs/{job}_{rank}_log.{kind}")


def test_the_last_lines_of_the_newest_log(fake: FakeSlurm, capsys: pytest.CaptureFixture) -> None:
    _log("11", 0, "err").write_text("old\n")
    _launch("logs", "owt")
    assert capsys.readouterr().out == "old\n"  # job 12 has written nothing yet
    _log("12", 0, "out").write_text("")
    _log("12", 0, "err").write_text("".join(f"line {i}\n" for i in range(100)))
    _launch("logs", "owt", "--lines", "3")
    said = capsys.readouterr()
    assert said.out == "line 97\nline 98\nline 99\n"
    assert said.err.split() == [str(_log("12", 0, kind).absolute()) for kind in ("out", "err")]
    _launch("logs", "owt", "--job", "11")
    assert capsys.readouterr().out == "old\n"


def test_logs_that_are_not_there(fake: FakeSlurm) -> None:
    with pytest.raises(UserError, match="job 12 has written nothing yet"):
        _launch("logs", "owt")
    for rank in (0, 1, 2):
        _log("12", rank, "err").write_text("x")
    with pytest.raises(UserError, match="has logs of ranks 0 to 2"):
        _launch("logs", "owt", "--rank", "3")


@pytest.mark.parametrize("block_bytes", [1, 3, 7, 1 << 16])
@pytest.mark.parametrize("text", ["", "\n", "one", "one\n", "a\nb\n\nc", "\n\n\n", "é\n" * 50 + "last"])
def test_tails_are_those_of_the_whole_text(
    fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    text: str,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(logs, "_BLOCK_BYTES", block_bytes)
    _log("12", 0, "err").write_text(text)
    for lines in (1, 2, 3, 60):
        LogTail(read_launches(Path("runs/owt/jobs"))[-1], 0, lines).print_new()
        assert capsys.readouterr().out == "".join(text.splitlines(keepends=True)[-lines:])


def test_following_goes_through_a_requeue_and_ends_with_the_job(
    fake: FakeSlurm, capsys: pytest.CaptureFixture
) -> None:
    path = _log("12", 0, "err")
    tail = LogTail(read_launches(Path("runs/owt/jobs"))[-1], 0, lines=1)
    steps = [
        lambda: path.write_text("first\n"),
        lambda: path.write_text("first\nsecond\n"),
        lambda: path.write_text("cut\n"),  # begun anew
        lambda: os.replace(_written("other.log", "another file, longer than that\n"), path),
        path.unlink,
        lambda: path.write_text("back\n"),
    ]
    answers = iter([False, True, False, True, True])  # at its time limit it seems to have ended

    def sleep(_: float) -> None:
        if steps:
            steps.pop(0)()

    follow(tail, lambda: next(answers), sleep)
    assert capsys.readouterr().out == "first\nsecond\ncut\nanother file, longer than that\nback\n"
    assert next(answers, None) is None


def _written(name: str, text: str) -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def test_following_prefers_a_job_that_goes_on(fake: FakeSlurm, capsys: pytest.CaptureFixture) -> None:
    _log("11", 0, "err").write_text("old\n")
    launches = read_launches(Path("runs/owt/jobs"))
    assert logs.choose_job(launches, 0, follows=True).record.job_id == "12"
    assert logs.choose_job(launches, 0, follows=False).record.job_id == "11"
    fake.knows(12, job_line(12, "FAILED", stdout=f"{Path.cwd()}/runs/owt/jobs/12_0_log.out"))
    assert logs.choose_job(launches, 0, follows=True).record.job_id == "11"


def test_a_controller_that_is_away_ends_no_following(fake: FakeSlurm, capsys: pytest.CaptureFixture) -> None:
    launched = read_launches(Path("runs/owt/jobs"))[-1]
    assert not logs.job_has_ended(launched)
    fake.program("scontrol", "#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert not logs.job_has_ended(launched)
    assert "Unable to contact" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (5, "0:05"), (65, "1:05"), (3725, "1:02:05"), (90061, "1-01:01:01")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
