"""Where a command speaks may be gone, full or closed: training goes on, and half a result is refused."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.faults.process_runs import COMMAND, ENDLESS, config_file, ends, saved, start, steps, wait_for_step
from tests.tiny_data import write_tiny_data

pytestmark = pytest.mark.fault(40)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def test_a_training_outlives_the_reader_of_what_it_says(data: Path, tmp_path: Path) -> None:
    """`pgm-scale train ... 2>&1 | head -1`, and then a signal: it still saves."""
    run = tmp_path / "run"
    process = start(["train", config_file(data, run, **ENDLESS)], stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1/")
    process.stdout.close()
    wait_for_step(run, 5, process)
    process.terminate()
    assert process.wait(100) == 75
    assert saved(run) == [steps(run)[-1]]


def test_a_training_outlives_its_terminal(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    terminal, its = os.openpty()
    process = start(["train", config_file(data, run)], stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    os.close(terminal)  # from here on each write fails with EIO
    assert process.wait(100) == 0
    assert saved(run) == [3, 6]


def test_closed_streams_are_no_files_of_the_run(data: Path, tmp_path: Path) -> None:
    """Else the first files that are opened get their numbers, and what is said goes into them."""
    run = tmp_path / "run"
    command = [*COMMAND, "train", config_file(data, run, **ENDLESS)]
    process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])
    wait_for_step(run, 3, process)
    opened = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    process.terminate()
    assert process.wait(100) == 75
    assert opened == ["/dev/null"] * 3
    assert saved(run) == [steps(run)[-1]]


@pytest.mark.parametrize("command", ["config", "runs"])
def test_a_result_that_cannot_be_written_is_one_line(data: Path, tmp_path: Path, command: str) -> None:
    words = [command, config_file(data, tmp_path / "run") if command == "config" else str(tmp_path)]
    with open(tmp_path / "out", "w") as out:
        full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))  # as a disk without room
        codes, (said,) = ends([start(words, stdout=out, preexec_fn=full)])
    assert codes == [2]
    assert said == "stdout cannot be written (File too large): the output is not complete\n"


def test_head_ends_a_long_table_without_a_traceback(tmp_path: Path) -> None:
    for number in range(700):
        (tmp_path / f"run-{number}").mkdir()
        (tmp_path / f"run-{number}" / "config.yaml").touch()
    process = start(["runs", "--json", str(tmp_path)])
    assert process.stdout is not None
    assert process.stdout.readline() == "[\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(100) == 141
    table = [
        sys.executable,
        "-c",
        f"import sys; from pgm_scale.cli import main; sys.exit(main(['runs', {str(tmp_path)!r}]))",
    ]
    piped = subprocess.run(
        ["sh", "-c", '"$@" | head -1', "sh", *table], capture_output=True, text=True, timeout=100
    )
    assert piped.stdout.startswith("run ")
    assert piped.stderr == ""
