"""Signals at a start, a closed terminal, and limits of the machine: real processes of the command line."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.faults.process_runs import ENDLESS, config_file, ends, saved, start, steps, wait_for_step
from tests.tiny_data import write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.fault(43)
def test_a_closed_terminal_is_a_signal_to_save(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(["train", config_file(data, run, **ENDLESS)])
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGHUP)
    codes, (said,) = ends([process])
    assert codes == [75]
    assert "stopped by a signal after step" in said
    assert saved(run) == [steps(run)[-1]]


@pytest.mark.fault(43)
def test_nohup_is_obeyed(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ignoring = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = start(["train", config_file(data, run)], preexec_fn=ignoring)
    wait_for_step(run, 1, process)
    process.send_signal(signal.SIGHUP)
    assert ends([process])[0] == [0]
    assert saved(run) == [3, 6]


# Ctrl-C in the import of a library that catches all, as torch does while it looks for numpy.
LOST = """
import os, signal, sys
from pgm_scale.cli import main
import pgm_scale.cli.train as train

def broken(stop, options, distils):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
    {then}

train._run_until = broken
sys.exit(main(["train", "none.yaml", "training.steps=1"]))
"""


@pytest.mark.fault(44)
@pytest.mark.parametrize("then", ["raise AttributeError('half a library')", "stop.answers_interrupts = True"])
def test_ctrl_c_that_a_library_has_caught_still_ends_the_start(then: str) -> None:
    """It would train on with half a library, or end in the traceback of one."""
    script = LOST.format(then=then)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.fault(45)
def test_too_few_open_files_are_told_at_the_start(data: Path, tmp_path: Path) -> None:
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40))
    codes, (said,) = ends([start(["train", config_file(data, tmp_path / "run")], preexec_fn=few)])
    assert codes == [2]
    assert (
        said == "1 ranks need about 66 open files a process, and at most 40 are allowed: raise `ulimit -n`\n"
    )


@pytest.mark.fault(45)
def test_the_soft_limit_of_open_files_is_raised(data: Path, tmp_path: Path) -> None:
    """1024 is the usual one, and rank 0 alone has two connections of each rank."""
    run = tmp_path / "run"
    soft = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 500))
    process = start(["train", config_file(data, run, **ENDLESS)], preexec_fn=soft)
    wait_for_step(run, 1, process)
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (500, 500)
    process.kill()
    process.wait()
