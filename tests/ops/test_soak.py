"""The soak's own eyes: it must see what is put before it. Its kills: tests/faults/test_random_kills.py."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ops.soak.__main__ import main
from ops.soak.board import Board, Place
from ops.soak.checks import (
    checkpoint_problems,
    committed,
    final_problems,
    leftover_problems,
    read_records,
    record_problems,
)
from ops.soak.cycle import Event, exit_problems, phase_of
from ops.soak.memory import LongSession, Sample
from ops.soak.runs import Layout
from ops.soak.server import ForkServer
from ops.soak.sessions import Outcome, Plan
from pgm_scale.errors import Preempted
from tests.checkpoint.support import save_step, step_folder

RECORDS = [{"step": step, "loss": 3.0 + step / 7, "samples": 16 * step, "mfu": None} for step in (1, 2, 3)]


def outcome(*exit_codes: int, hit: bool = True) -> Outcome:
    return Outcome(list(exit_codes), 1.0, 0.5, hit, None, [9], 0, None)


def event(plan: Plan, found: Outcome) -> Event:
    return Event(Layout(), True, True, plan, found, 0, 0, "", False, [])


def test_records_are_compared_to_the_last_bit_and_by_their_steps() -> None:
    assert list(record_problems(RECORDS, RECORDS, exact=True)) == []
    other = [dict(record) for record in RECORDS]
    other[1] |= {"loss": (3.0 + 2 / 7) * (1 + 1e-15), "mfu": 0.5}
    assert len(list(record_problems(other, RECORDS, exact=True))) == 1
    assert list(record_problems(other, RECORDS, exact=False)) == []
    other[1] |= {"loss": 3.2858, "samples": 31}
    assert len(list(record_problems(other, RECORDS, exact=False))) == 2


def test_missing_and_double_records_are_found() -> None:
    gap = [RECORDS[0], RECORDS[2]]
    assert "[2] are missing" in next(record_problems(gap, RECORDS, exact=True))
    assert list(record_problems(gap, RECORDS, exact=True, may_miss={2})) == []
    assert list(record_problems([*RECORDS, RECORDS[2]], RECORDS, exact=True))


def test_only_a_killed_session_may_leave_half_a_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert read_records(tmp_path, killed=True) == [{"step": 1}]
    with pytest.raises(json.JSONDecodeError):
        read_records(tmp_path, killed=False)


def test_a_bad_byte_in_a_committed_step_is_found(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    save_step(tmp_path, 6)
    assert committed(tmp_path) == [3, 6]
    assert list(checkpoint_problems(tmp_path)) == []
    file = step_folder(tmp_path, 3) / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "step 3 is bad" in next(checkpoint_problems(tmp_path))


def test_a_save_with_its_manifest_counts_as_committed(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    save_step(tmp_path, 6)
    saving = tmp_path / "checkpoints" / ".step_00000006.saving"
    os.rename(step_folder(tmp_path, 6), saving)
    assert committed(tmp_path) == [3, 6]
    (saving / "manifest.json").unlink()
    assert committed(tmp_path) == [3]


@pytest.mark.parametrize("exact", [True, False])
def test_other_values_in_the_last_step_are_found(tmp_path: Path, exact: bool) -> None:
    for name, step in (("run", 3), ("same", 3), ("other", 4)):
        save_step(tmp_path / name, step)
    os.rename(step_folder(tmp_path / "other", 4), step_folder(tmp_path / "other", 3))
    assert list(final_problems(tmp_path / "run", tmp_path / "same", 3, exact)) == []
    found = list(final_problems(tmp_path / "run", tmp_path / "other", 3, exact))
    assert len(found) == (12 if exact else 4), "of each tensor, or of each kind"


def test_what_is_left_in_a_finished_run_is_found(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    assert [p for p in leftover_problems(tmp_path, keep_last=2, has_saved=True) if "kept" in p] == []
    assert any("3 steps are kept" in p for p in leftover_problems(tmp_path, keep_last=1, has_saved=True))
    (tmp_path / ".metrics.prom.12.34.writing").touch()
    (tmp_path / "checkpoints" / ".step_00000004.saving").mkdir()
    found = " ".join(leftover_problems(tmp_path, keep_last=2, has_saved=True))
    assert ".metrics.prom.12.34.writing" in found
    assert ".step_00000004.saving" in found


@pytest.mark.parametrize(
    ("plan", "found", "is_fine"),
    [
        (Plan(), outcome(0, hit=False), True),
        (Plan(), outcome(1, hit=False), False),
        (Plan("kill"), outcome(-9), True),
        (Plan("kill"), outcome(1), False),
        (Plan("kill", rank=1), outcome(4, -9), True),
        (Plan("kill", rank=1), outcome(1, -9), False),
        (Plan("terminate", rank=0), outcome(75, 75), True),
        (Plan("terminate", rank=0), outcome(0, 0), True),
        (Plan("terminate", rank=0), outcome(75, 0), False),
        (Plan("terminate", rank=0), outcome(4, 4), False),
        (Plan("terminate", rank=1), outcome(2, -15), True),
    ],
)
def test_exit_codes_must_follow_from_what_was_done(plan: Plan, found: Outcome, is_fine: bool) -> None:
    assert (exit_problems(event(plan, found)) == []) == is_fine


@pytest.mark.parametrize(
    ("progress", "operation", "state", "phase"),
    [
        ("", "", "validating", "start"),
        ("", "fsync .config.yaml.writing", "starting", "start"),
        ("checking step_00000003", "", "starting", "resume"),
        ("reading the data of step 4", "", "training", "data"),
        ("step 4, micro-batch 1", "", "training", "step"),
        ("step 4, micro-batch 1", "fsync rank_00000.safetensors", "training", "save"),
        ("step 4, micro-batch 1", "mkdir .step_00000006.saving", "training", "save"),
        ("update of step 5", "fsync manifest.json", "training", "commit"),
        ("update of step 5", "rename .step_00000006.saving", "saving", "commit"),
        ("update of step 5", "replace .LATEST.writing", "saving", "commit"),
        ("update of step 5", "rename step_00000003", "saving", "purge"),
        ("update of step 5", "rmdir .step_00000003.purging", "saving", "purge"),
        ("update of step 5", "", "validating", "validation"),
    ],
)
def test_where_a_rank_was_has_a_name(progress: str, operation: str, state: str, phase: str) -> None:
    assert phase_of(Place(progress, operation, 0), state) == phase


def test_a_board_outlives_who_writes_on_it(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        board = Board(tmp_path / "board")
        board.progress("ä" * 200)
        board.operation("fsync manifest.json", 7)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    place = Board(tmp_path / "board").place()
    assert place.progress.startswith("ä" * 60)
    assert place[1:] == ("fsync manifest.json", 7)


def long_session(bytes_per_step: float, files_per_step: float = 0.0) -> LongSession:
    """A sample every 3 s and 30 steps, of a heap that settles, and one in ten of them 20 MiB above it."""
    samples = [
        Sample(
            time_s=3.0 * n,
            step=30 * n,
            private_bytes=0,
            resident_bytes=int(50e6 - 1e6 / (n + 1) + bytes_per_step * 30 * n + (20 << 20) * (n % 10 == 9)),
            descriptors=30 + int(files_per_step * 30 * n) + n % 3,
            threads=8,
        )
        for n in range(200)
    ]
    return LongSession("a layout", 0.0, outcome(Preempted.exit_code), [samples])


def test_growth_is_told_from_a_heap_that_settles() -> None:
    assert list(long_session(0).problems()) == []
    assert long_session(2000).growth(0) == pytest.approx(2000, abs=50)
    assert "grows by" in next(long_session(2000).problems())
    assert "descriptors" in next(long_session(0, files_per_step=0.01).problems())


def test_a_short_soak_finds_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One run that is killed until it has finished, and a session that nothing happens to."""
    out = tmp_path / "out"
    assert main(["--minutes", "0.05", "--ranks-up-to", "1", "--out", str(out), "--seed", "5"]) == 0
    assert "no violation" in capfd.readouterr().out
    assert {path.name for path in out.iterdir()} == {"events.jsonl", "result.md", "soak.json", "soak.png"}
    found = json.loads((out / "soak.json").read_text())
    assert found["exact_cycles"] == 1
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert {event["seed"] for event in events} == {5}
    assert events[-1]["newest_after"] == 120


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _exit(code: int) -> None:
    sys.exit(code)


def test_the_server_forks_and_knows_how_its_processes_ended() -> None:
    with ForkServer() as server:
        ended, killed, living = server.fork(_exit, 7), server.fork(_sleep, 60.0), server.fork(_sleep, 60.0)
        os.kill(killed, signal.SIGKILL)
        while server.exit_code(ended) is None or server.exit_code(killed) is None:
            time.sleep(0.01)
        assert (server.exit_code(ended), server.exit_code(killed)) == (7, -signal.SIGKILL)
        assert server.exit_code(living) is None
    assert server._process.exitcode == 0
    assert not Path(f"/proc/{living}/exe").exists(), "it ends with the server"
