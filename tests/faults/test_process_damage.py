"""The small files of a run folder damaged before a resume: it goes on, or says in one line which file it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pgm_scale.checkpoint.lock import RunLock
from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.loop import train_on_mesh
from tests.distributed import run_ranks
from tests.faults.process_runs import saved, steps
from tests.tiny_data import tiny_config, write_tiny_data

FOLDER = "a folder"
# A file, what is in its place, and what a resume says of it if it cannot go on.
DAMAGE: list[tuple[str, bytes | str, str]] = [
    ("heartbeat.json", b"\xff{", ""),
    ("heartbeat.json", FOLDER, ""),
    ("metrics.jsonl", b'{"step": 1, "loss": NaN}\n\xff\xfe\n{"step": [1]}\n[[[\n{"step": 2', ""),
    ("metrics.prom", FOLDER, ""),
    ("tracker.json", b'{"last_step": 1e999}', ""),
    ("run.lock", b"\xff" * 10, ""),
    ("run.lock", b'{"host": 1}', ""),
    ("hangs", b"a file", ""),
    ("tokenizer.json", b"", ""),
    ("checkpoints/LATEST", b"\xff\0", ""),
    ("run.json", b"{", "run.json"),
    ("run.json", FOLDER, "run.json"),
    ("config.yaml", b"\xff\xfe", "config.yaml"),
    ("config.yaml", FOLDER, "config.yaml"),
    ("metrics.jsonl", FOLDER, "metrics.jsonl"),
]


def _train(mesh: Mesh, config: RunConfig) -> str:
    """What the user is told when it does not go well."""
    lock = RunLock(config.folder, heartbeat_interval_s=0.1, dead_after_s=0.3)
    splits = SplitStorage(config.data.train), SplitStorage(config.data.validation)
    try:
        lock.acquire()
        train_on_mesh(config, mesh, *splits, lock=lock)
    except UserError as error:
        return str(error)
    finally:
        lock.release()
    return ""


def _resume_all(mesh: Mesh, first: RunConfig, resumed: list[RunConfig]) -> list[str]:
    assert _train(mesh, first) == ""
    for (name, content, _), config in zip(DAMAGE, resumed, strict=True):
        shutil.copytree(first.folder, config.folder)
        _damage(Path(config.folder) / name, content)
    return [_train(mesh, config) for config in resumed]


def _damage(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.mkdir()


@pytest.mark.fault(47)
def test_damaged_small_files_stop_no_resume_or_are_named(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    quick = {"validation": {"interval_steps": 1000, "sequences": 8, "samples": 0}}
    first = tiny_config(data, tmp_path / "first", training={"steps": 3}, **quick)
    resumed = [
        tiny_config(data, tmp_path / f"run-{n}", training={"steps": 6}, **quick) for n in range(len(DAMAGE))
    ]
    told = run_ranks(1, _resume_all, first, resumed)
    for (name, content, expected), config, said in zip(DAMAGE, resumed, told, strict=True):
        run, case = Path(config.folder), (name, content, said)
        assert "\n" not in said, case
        assert bool(said) == bool(expected), case
        assert expected in said, case
        if not expected:
            assert saved(run) == [3, 6], case
            assert steps(run)[-3:] == [4, 5, 6], case
        else:
            assert saved(run) == [3], case
