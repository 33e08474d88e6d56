"""Whose files in shared memory are left over: real processes that map, hold or have left them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgm_scale.preflight.shared_memory import leftovers, shared_memory_rows

_OLD_S = 7200


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _file(folder: Path, name: str, age_s: float = _OLD_S) -> Path:
    path = folder / name
    path.write_bytes(b"x" * 4096)
    written_s = path.stat().st_mtime - age_s
    os.utime(path, (written_s, written_s))
    return path


@pytest.mark.fault(29)
def test_only_known_old_and_unused_files_are_left_over(tmp_path: Path, dead_pid: int) -> None:
    left = {
        _file(tmp_path, "deepspeed_allreduce_buffer_0_1").name,
        _file(tmp_path, f"torch_{dead_pid}_1234_0").name,
        _file(tmp_path, "sem.mp-abcdef").name,
        _file(tmp_path, "000000_locals").name,
    }
    _file(tmp_path, f"torch_{os.getpid()}_1234_0")  # its process lives, though it maps nothing now
    _file(tmp_path, "someone_elses_database")
    _file(tmp_path, "nccl-young", age_s=0)
    (tmp_path / "torch_folder").mkdir()
    assert {leftover.path.name for leftover in leftovers(tmp_path)} == left
    assert {path.name for path in tmp_path.iterdir()} > left  # nothing was deleted


@pytest.mark.parametrize("use", ["mmap.mmap(f.fileno(), 0)", "f"])
def test_a_file_that_a_process_maps_or_holds_is_in_use(tmp_path: Path, use: str) -> None:
    path = _file(tmp_path, "nccl-abc")
    script = (
        f"import mmap, sys; f = open(sys.argv[1], 'r+b'); kept = {use}; print('ready', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert leftovers(tmp_path) == []
    process.communicate("\n")
    assert [leftover.path for leftover in leftovers(tmp_path)] == [path]


@pytest.mark.fault(29)
def test_the_row_names_owner_size_and_age(tmp_path: Path) -> None:
    room, *none = shared_memory_rows(1, tmp_path)
    assert (room.check, none) == ("shared memory", [])
    for number in range(5):
        _file(tmp_path, f"psm_{number}")
    rows = [row for row in shared_memory_rows(1, tmp_path) if row.check == "leftovers"]
    assert len(rows) == 1
    assert rows[0].status == "warning"
    assert rows[0].value.startswith("5 file(s)")
    assert "up to 2 h old: psm_0, psm_1, psm_2, ..." in rows[0].value
    assert str(tmp_path) in rows[0].to_do


def test_too_little_room_for_the_ranks_is_told(tmp_path: Path) -> None:
    row = next(iter(shared_memory_rows(1 << 40, tmp_path)))
    assert row.status == "warning"
