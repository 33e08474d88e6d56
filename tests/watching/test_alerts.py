"""The alert hook: what the command is told, how often it runs, and that it can hold nothing up."""

import logging
import os
import time
from pathlib import Path

import pytest

from pgm_scale.config import WatchingConfig
from pgm_scale.watching import alerts as module
from pgm_scale.watching.alerts import Alerts, alert

PATIENCE_S = 60.0  # of the tests: a loaded machine is slow


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_the_command_is_told_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    variables = " ".join(f'"$PGM_SCALE_{name}"' for name in ("EVENT", "RUN", "STEP", "MESSAGE"))
    command = f'printf "%s|%s|%s|%s" {variables} > {out}'
    message = "two\nlines with $(touch danger) ; `x` 'quotes' \"too\" and \0"
    alert(WatchingConfig(alert_command=command), "crash_loop", tmp_path / "run", message, 12)
    told = out.read_text().split("|")
    assert told[:3] == ["crash_loop", str(tmp_path / "run"), "12"]
    assert told[3] == "two lines with $(touch danger) ; `x` 'quotes' \"too\" and"
    alert(WatchingConfig(alert_command=command), "failed", tmp_path / "run", "no step")
    assert out.read_text().split("|")[2] == ""


def test_a_secret_of_several_lines_is_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSH_PRIVATE_KEY", "first line of it\nsecond line of it\n")
    out = tmp_path / "out"
    command = f'printf "%s" "$PGM_SCALE_MESSAGE" > {out}; printenv SSH_PRIVATE_KEY; exit 3'
    alert(WatchingConfig(alert_command=command), "failed", tmp_path, f"got {os.environ['SSH_PRIVATE_KEY']}")
    assert out.read_text() == "got <SSH_PRIVATE_KEY>"
    assert "exit code 3: <SSH_PRIVATE_KEY>" in caplog.text


def test_no_command_is_no_alert(tmp_path: Path) -> None:
    assert not Alerts(None, tmp_path).send("finished", 1, "x")
    alert(WatchingConfig(), "finished", tmp_path, "x")


def test_the_same_event_alerts_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, now_s = tmp_path / "out", [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    alerts = Alerts(f"echo $PGM_SCALE_EVENT >> {out}", tmp_path)
    sent = [alerts.send("straggler", 1, "x"), alerts.send("straggler", 2, "x"), alerts.send("hung", 2, "x")]
    alerts.wait()
    now_s[0] += 59
    sent.append(alerts.send("straggler", 3, "x"))
    now_s[0] += 2
    sent.append(alerts.send("straggler", 4, "x"))
    alerts.wait()
    assert sent == [True, False, True, False, True]
    assert sorted(out.read_text().split()) == ["hung", "straggler", "straggler"]


@pytest.mark.fault(49)
def test_a_command_that_hangs_is_killed_with_all_its_children(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pids = tmp_path / "pids"
    alerts = Alerts(f"sleep 600 & echo $! $$ > {pids}; trap '' TERM; wait", tmp_path, timeout_s=1.0)
    start_s = time.monotonic()
    with caplog.at_level(logging.WARNING):
        alerts.send("hung", 1, "x")
        assert time.monotonic() - start_s < PATIENCE_S / 2, "sending waits for nothing"
        alerts.wait(PATIENCE_S)
    assert "took longer than 1 s and was killed" in caplog.text
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    deadline_s = time.monotonic() + PATIENCE_S
    while any(map(_is_alive, started)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not any(map(_is_alive, started))


@pytest.mark.fault(49)
def test_what_the_command_leaves_behind_holds_nothing_up(tmp_path: Path) -> None:
    """It keeps the output open, which a pipe's reader would wait for."""
    pid = tmp_path / "pid"
    alerts = Alerts(f"sleep 600 & echo $! > {pid}", tmp_path)
    alerts.send("hung", 1, "x")
    start_s = time.monotonic()
    alerts.wait(PATIENCE_S)
    os.kill(int(pid.read_text()), 9)
    assert time.monotonic() - start_s < PATIENCE_S / 2


@pytest.mark.fault(49)
@pytest.mark.parametrize("command", ["echo what is wrong; exit 3", "no-such-program-here"])
def test_a_failing_command_is_logged_and_raises_nothing(
    tmp_path: Path, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        alert(WatchingConfig(alert_command=command), "failed", tmp_path, "x")
    (record,) = caplog.records
    assert "alert command for failed failed with exit code" in record.getMessage()
    assert "what is wrong" in record.getMessage() or "not found" in record.getMessage()


def test_a_command_that_cannot_be_started_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        alert(WatchingConfig(alert_command="echo \0"), "failed", tmp_path, "x")
    assert "cannot be started" in caplog.text


def test_secrets_are_not_passed_on_in_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k1e2y3" * 6)
    out = tmp_path / "out"
    alert(
        WatchingConfig(alert_command=f'echo "$PGM_SCALE_MESSAGE" > {out}'),
        "failed",
        tmp_path,
        f"bad key {'k1e2y3' * 6}",
    )
    assert "k1e2y3" not in out.read_text()
    assert "bad key" in out.read_text()
