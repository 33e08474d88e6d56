"""`pgm-scale runs`: what is said of runs in every state, of damaged ones, and without torch."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgm_scale.cli import main
from pgm_scale.errors import UserError
from pgm_scale.holder import Holder
from pgm_scale.watching.heartbeat import HEARTBEAT_NAME
from pgm_scale.watching.runs import Lock, find_runs, judge, read_status
from tests.watching.test_heartbeat import heartbeat

NOW_S = 2000.0
FRESH, OLD = {"unix_time_s": NOW_S - 600}, {"unix_time_s": NOW_S - 700}  # timeout_s is 600


def write_run(folder: Path, **changes: Any) -> Path:
    """A run folder with a heartbeat, and none if `changes` say that there is none."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": folder.name, "training": {"steps": 9}}))
    (folder / "run.json").write_text("{}")
    if changes != {"none": True}:
        (folder / HEARTBEAT_NAME).write_bytes(heartbeat(run=folder.name, **changes).to_bytes())
    return folder


def save_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    for other in ("LATEST", "quarantine", ".step_00000099.saving", "step_x"):
        (folder / "checkpoints" / other).mkdir()


HERE, ELSEWHERE = Holder.here(), dataclasses.replace(Holder.here(), machine="another")
DEAD = dataclasses.replace(HERE, start_ticks="1")


@pytest.mark.parametrize(
    ("beat", "lock", "state"),
    [
        ({"state": "finished", **OLD}, None, "finished"),
        ({"state": "failed", **OLD}, None, "failed"),
        ({"state": "stopped:preempted", **OLD}, None, "preempted"),
        ({"state": "starting", **FRESH}, Lock(True, 1), "starting"),
        ({"state": "validating", **FRESH}, Lock(True, 1), "running"),
        ({"state": "training", **FRESH}, None, "running"),
        ({"state": "training", **FRESH}, Lock(None, 1), "running"),
        ({"state": "training", **FRESH}, Lock(False, 1), "killed"),
        ({"state": "training", **OLD}, Lock(True, 1), "stalled"),
        ({"state": "training", **OLD}, Lock(None, 20), "stalled"),
        ({"state": "training", **OLD}, Lock(None, 200), "killed"),
        ({"state": "saving", **OLD}, None, "killed"),
        ({"state": "training", "unix_time_s": NOW_S + 500}, Lock(None, -500), "running"),  # another clock
    ],
)
def test_the_state_of_a_run(beat: dict[str, Any], lock: Lock | None, state: str) -> None:
    assert judge(heartbeat(**beat), lock, NOW_S) == state


def test_the_holder_of_the_lock_is_asked_for(tmp_path: Path) -> None:
    for name, holder, state in (
        ("here", HERE, "running"),
        ("dead", DEAD, "killed"),
        ("far", ELSEWHERE, "running"),
    ):
        folder = write_run(tmp_path / name, unix_time_s=time.time())
        (folder / "run.lock").write_bytes(holder.to_bytes())
        assert read_status(folder).state == state, name
    (folder / "run.lock").write_bytes(b"\xff")
    assert read_status(folder).state == "running", "an unreadable lock is somebody's"
    os.utime(folder / "run.lock", (1, 1))
    assert read_status(folder, time.time() + 1e6).state == "killed"


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "owt", unix_time_s=NOW_S - 5, job="12_1", tokens_per_second=1e6)
    save_steps(folder, 2, 4, 100_000_000)
    os.utime(folder / "checkpoints" / "step_100000000", (1900, 1900))
    records = [
        {"step": 1, "validation_perplexity": 30.5},
        {"step": 2, "validation_perplexity": None},
        {"step": 3},
    ]
    (folder / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, records)) + '\n{"step": 4, "validation_perp'
    )
    status = read_status(folder, NOW_S)
    assert dataclasses.asdict(status) == {
        "folder": str(folder),
        "run": "owt",
        "state": "running",
        "doing": "training",
        "step": 5,
        "total_steps": 9,
        "loss": 2.5,
        "tokens_per_second": 1e6,
        "validation_perplexity": 30.5,
        "last_checkpoint_step": 100_000_000,
        "last_checkpoint_unix_time_s": 1900,
        "job": "12_1",
        "restarts": 1,
        "updated_unix_time_s": NOW_S - 5,
        "note": None,
    }


def test_only_the_end_of_long_metrics_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", none=True)
    line = json.dumps({"step": 7, "loss": 1.5, "text": "x" * 200}) + "\n"
    far = json.dumps({"step": 1, "validation_perplexity": 3.0}) + "\n"
    near = json.dumps({"step": 2, "validation_perplexity": 2.0}) + "\n"
    (folder / "metrics.jsonl").write_text(far + line * 2000)
    status = read_status(folder)
    assert (status.step, status.loss, status.validation_perplexity) == (7, 1.5, None)
    (folder / "metrics.jsonl").write_text(far + line * 2000 + near + line * 500)
    assert read_status(folder).validation_perplexity == 2.0


def test_runs_without_a_heartbeat(tmp_path: Path) -> None:
    new = write_run(tmp_path / "new", none=True)
    assert read_status(new).state == "never started"
    save_steps(new, 3)
    (new / "metrics.jsonl").write_text('{"step": 4, "loss": 1.25, "unix_time_s": 7.0}\n')
    status = read_status(new)
    assert (status.state, status.step, status.total_steps, status.loss) == ("stopped", 4, 9, 1.25)
    assert (status.last_checkpoint_step, status.updated_unix_time_s) == (3, 7.0)
    (new / "checkpoints" / "step_00000009").mkdir()
    assert read_status(new).state == "finished"
    (new / "run.lock").write_bytes(HERE.to_bytes())
    assert read_status(new).state == "running"
    (new / "run.lock").write_bytes(DEAD.to_bytes())
    assert read_status(new).state == "killed"


DAMAGE: list[tuple[str, bytes | None]] = [
    (HEARTBEAT_NAME, b""),
    (HEARTBEAT_NAME, b"[" * 70_000),
    (HEARTBEAT_NAME, b"{}"),
    (HEARTBEAT_NAME, None),
    ("config.yaml", b"a: [1"),
    ("config.yaml", b"\xff\xfe"),
    ("config.yaml", b"- 1"),
    ("config.yaml", b"training: 5"),
    ("config.yaml", b"a: " + b"[" * 20_000),
    ("config.yaml", None),
    ("metrics.jsonl", b'null\n[1]\n{"step": "x", "loss": [], "unix_time_s": 1e999}\n\xff\n' + b"[" * 50_000),
    ("metrics.jsonl", None),
    ("run.lock", None),
    ("checkpoints", b"a file"),
]


@pytest.mark.fault(47)
@pytest.mark.parametrize(("name", "content"), DAMAGE)
@pytest.mark.parametrize("beats", [False, True])
def test_damage_is_a_row_and_no_error(
    tmp_path: Path, name: str, content: bytes | None, beats: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", **({} if beats else {"none": True}))
    if content is None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    status = read_status(folder)
    if name == HEARTBEAT_NAME or (name == "config.yaml" and not beats):
        assert status.state == "damaged"
        assert status.note is not None
        assert status.note.startswith(f"{name}: ")
        assert "\n" not in status.note
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("run") >= 1
    assert main(["runs", "--json", str(tmp_path)]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_runs_are_found_in_folders_of_folders_and_not_in_runs(tmp_path: Path) -> None:
    for name in ("b", "a", "sweep/2", "sweep/1"):
        write_run(tmp_path / name)
    write_run(tmp_path / "a" / "jobs" / "inner")
    write_run(tmp_path / ".hidden")
    (tmp_path / "sweep" / "notes.txt").write_text("")
    found = [str(path.relative_to(tmp_path)) for path in find_runs([tmp_path, tmp_path / "a"])]
    assert found == ["a", "b", "sweep/1", "sweep/2"]
    with pytest.raises(UserError, match="is not a folder"):
        find_runs([tmp_path / "none"])


def test_the_table_shows_hostile_names_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(
        tmp_path / "[red]x[", state="failed", exit_reason="bug: \x1b[2J [bold] nasty", unix_time_s=time.time()
    )
    write_run(tmp_path / "well", state="saving", unix_time_s=time.time())
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "[red]x[" in out
    assert "bug: ?[2J [bold] nasty" in out
    assert "running (saving)" in out
    assert "5/9" in out


def test_what_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["missing"], ["--watch", "1", str(tmp_path)]):
        assert main(["runs", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
    for text in ("0", "nan", "x", "-3"):
        with pytest.raises(SystemExit):
            main(["runs", "--watch", text])
    (tmp_path / "runs").mkdir()
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert "no runs in runs" in capsys.readouterr().out


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code = (
        "import sys; from pgm_scale.cli import main; main(['runs', sys.argv[1]]);"
        "heavy = {'torch', 'numpy', 'submitit', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=60)
