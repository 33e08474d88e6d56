"""Slurm's answers, as 22.05 gave them, and what may go wrong with its programs."""

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers import slurm
from launchers.slurm import cancel_jobs, needed_jobs, parse_job, show_jobs
from pgm_scale.errors import UserError
from tests.launchers.fake_slurm import FakeSlurm, job_line


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def test_a_running_job() -> None:
    (view,) = parse_job(job_line(12, limit="1-00:10:00"))
    assert (view.id, view.name, view.state, view.reason, view.dependency) == ("12", "owt", "RUNNING", "", "")
    assert (view.nodes, view.node_list, view.restarts, view.exit_code) == (2, "node[1-2]", 0, 0)
    assert (view.run_s, view.limit_s, view.time_left_s) == (6, 87_000, 86_994)
    assert view.start_unix_s == datetime(2026, 11, 22, 15, 29, 30).timestamp()
    assert view.stdout == "/home/user/runs/owt/jobs/12_0_log.out"
    assert not view.has_ended


def test_a_waiting_job_knows_no_times() -> None:
    line = job_line(
        13,
        "PENDING",
        reason="Dependency",
        dependency="afterok:12(unfulfilled),afterany:11(unfulfilled)",
        limit="UNLIMITED",
        start="Unknown",
        end="Unknown",
        node_list="",
        nodes="2-4",
    )
    (view,) = parse_job(line)
    assert view.dependency == "afterok:12(unfulfilled),afterany:11(unfulfilled)"
    assert (view.nodes, view.node_list) == (2, "")
    assert view.limit_s is view.time_left_s is view.start_unix_s is view.end_unix_s is None


@pytest.mark.parametrize(
    ("state", "ended"),
    [
        ("COMPLETED", True),
        ("TIMEOUT", True),
        ("NODE_FAIL", True),
        ("COMPLETING", False),
        ("SUSPENDED", False),
    ],
)
def test_which_states_are_the_end(state: str, ended: bool) -> None:
    (view,) = parse_job(job_line(12, state, exit="3:9"))
    assert view.has_ended == ended
    assert (view.exit_code, view.exit_signal) == (3, 9)


@pytest.mark.parametrize("name", ["two words", "a JobState=FAILED b", "Restarts=7", "", "=", "x  y"])
def test_any_name_and_any_command(name: str) -> None:
    (view,) = parse_job(job_line(12, name=name, command="/x y/run JobState=FAILED Restarts=9"))
    assert (view.name, view.state, view.restarts) == (name, "RUNNING", 0)


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ("2", [2]),
        ("6-30:3%2", [6, 9, 12, 15, 18, 21, 24, 27, 30]),
        ("0,4-6", [0, 4, 5, 6]),
        ("1-3,7,...", [1, 2, 3, 7]),
    ],
)
def test_waiting_jobs_of_an_array_share_a_line(indices: str, expected: list[int]) -> None:
    line = job_line(20, "PENDING", array=f" ArrayJobId=18 ArrayTaskId={indices} ArrayTaskThrottle=2")
    views = list(parse_job(line))
    assert [view.id for view in views] == [f"18_{index}" for index in expected]
    assert {view.state for view in views} == {"PENDING"}


@given(st.text())
def test_other_text_is_one_line_of_error(text: str) -> None:
    with pytest.raises(UserError) as caught:
        list(parse_job("JobId=1 " + text))
    assert "cannot read what scontrol says" in str(caught.value)


def test_many_jobs_in_one_call_and_forgotten_ones_are_missing(fake: FakeSlurm) -> None:
    fake.knows(12, job_line(12))
    fake.knows(
        18,
        job_line(18, "PENDING", array=" ArrayJobId=18 ArrayTaskId=2-4"),
        job_line(19, "FAILED", array=" ArrayJobId=18 ArrayTaskId=1"),
    )
    views = show_jobs(["12", "18_1", "18_3", "18_9", "999", "12"])
    assert {id: view.state for id, view in views.items()} == {
        "12": "RUNNING",
        "18_1": "FAILED",
        "18_3": "PENDING",
    }
    assert fake.calls == 1


def test_no_jobs_need_no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert show_jobs([]) == {}
    cancel_jobs([])


def test_without_slurm_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask in (lambda: show_jobs(["1"]), needed_jobs, lambda: cancel_jobs(["1"])):
        with pytest.raises(UserError, match="no Slurm here"):
            ask()


def test_a_controller_that_is_away(fake: FakeSlurm) -> None:
    away = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    for program in ("scontrol", "squeue"):
        fake.program(program, f"#!/bin/bash\necho warning >&2; echo '{away}' >&2\nexit 1\n")
    for ask in (lambda: show_jobs(["1"]), needed_jobs):
        with pytest.raises(UserError) as caught:
            ask()
        assert away in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_program_that_never_answers(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.program("squeue", "#!/bin/bash\nexec sleep 60\n")
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match="gave no answer"):
        needed_jobs()


def test_the_users_settings_do_not_change_the_answers(
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SCANCEL_INTERACTIVE", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "relative")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/other.conf")
    fake.program("squeue", '#!/bin/bash\nenv | grep -q =relative && exit 1\n[ -n "$SLURM_CONF" ]\n')
    assert needed_jobs() == {}


def test_what_waiting_jobs_need(fake: FakeSlurm) -> None:
    fake.waiting(
        "13|afterok:12(unfulfilled),afterany:11(unfulfilled)\n14|(null)\n15|afterany:12(unfulfilled)\n"
        "16|afterok:18_*(unfulfilled)?afterok:13(failed)\n17_2|aftercorr:18_2(unfulfilled)\n"
    )
    assert needed_jobs() == {"13": ("12",), "16": ("18", "13"), "17_2": ("18_2",)}


def test_cancelling_says_why_it_failed(fake: FakeSlurm) -> None:
    cancel_jobs(["12", "18_1"])
    assert fake.updated == ["JobId=12 Requeue=0", "JobId=18_1 Requeue=0"]  # no batch script may undo it
    assert fake.cancelled == [["12", "18_1"]]
    fake.program("scancel", "#!/bin/bash\necho 'scancel: error: Access denied' >&2\nexit 1\n")
    with pytest.raises(UserError, match="scancel failed: scancel: error: Access denied"):
        cancel_jobs(["12"])


def test_a_scontrol_that_prints_its_prompt(fake: FakeSlurm) -> None:
    fake.program(
        "scontrol", f"#!/bin/bash\ncat <<'END'\nscontrol: scontrol: {job_line(12)}\nscontrol: \nEND\n"
    )
    assert set(show_jobs(["11", "12"])) == {"12"}
