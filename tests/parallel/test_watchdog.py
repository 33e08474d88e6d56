"""Real ranks that hang, stop, die or dawdle: the run ends with the one that did it named, or goes on."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pgm_scale.errors import HungRankError, UserError
from pgm_scale.parallel.launch import Launch, free_port
from pgm_scale.parallel.rendezvous import join
from pgm_scale.parallel.watchdog import Watchdog

TIMEOUT_S = 5.0
HUNG = HungRankError.exit_code
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pgm_scale.parallel.watchdog"])  # torch is imported once
Body = Callable[[Watchdog, int], None]


def steps(watchdog: Watchdog, count: int) -> None:
    for step in range(count):
        watchdog.progress(f"step {step}", step=step)
        watchdog.progress("all-reduce")
        dist.all_reduce(torch.ones(1))


def stopped(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    if rank == 1:
        watchdog.progress("data of step 3")
        time.sleep(1.5)  # a beat
        os.kill(os.getpid(), signal.SIGSTOP)
    steps(watchdog, 3)


def stopped_first(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    if rank == 0:
        watchdog.progress("data of step 3")
        time.sleep(3)  # the others hear of it
        os.kill(os.getpid(), signal.SIGSTOP)
    steps(watchdog, 3)


def oversleep() -> None:
    time.sleep(600)


def asleep(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    if rank == 2:
        watchdog.progress("data of step 3")
        oversleep()
    steps(watchdog, 3)


def holds_interpreter(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    if rank == 1:
        watchdog.progress("a C extension")
        time.sleep(1.5)  # a beat
        ctypes.PyDLL(None).sleep(600)
    steps(watchdog, 3)


def killed(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    time.sleep(3)  # some beats
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    steps(watchdog, 3)


def killed_first(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    time.sleep(3)  # some beats
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    steps(watchdog, 3)


def fails(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    if rank == 1:
        raise ValueError("a bug of ours")
    steps(watchdog, 3)


def slow(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    if rank == 1:
        for part in range(10):
            watchdog.progress(f"part {part}")
            time.sleep(TIMEOUT_S / 4)
    steps(watchdog, 3)


def long_phase(watchdog: Watchdog, rank: int) -> None:
    steps(watchdog, 3)
    watchdog.progress("validation")
    time.sleep(TIMEOUT_S * 2.5)
    steps(watchdog, 3)


def late(watchdog: Watchdog, rank: int) -> None:
    """Rank 0, which serves the store, is done long before rank 1 hangs."""
    steps(watchdog, 3)
    if rank == 1:
        watchdog.progress("the end")
        time.sleep(TIMEOUT_S / 2)
        watchdog.progress("the very end")
        oversleep()


def suspended(watchdog: Watchdog, rank: int) -> None:
    """Rank 0 is at work, and the others wait for it, when all are stopped."""
    steps(watchdog, 3)
    print("ready", file=sys.stderr, flush=True)
    if rank == 0:
        for _ in range(35):
            time.sleep(0.1)  # one long sleep would be over when the process goes on
    steps(watchdog, 3)


def rank_main(launch: Launch, body: Body, folder: Path) -> None:
    with open(folder / f"stderr-{launch.rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        store = join(launch, 60)
        with Watchdog(launch, store, TIMEOUT_S, folder / "hangs") as watchdog:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("process_group", store),
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timedelta(seconds=120),
            )
            body(watchdog, launch.rank)
            dist.destroy_process_group()
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)


@contextlib.contextmanager
def started(launches: list[Launch], body: Body, folder: Path) -> Iterator[list[ForkServerProcess]]:
    processes = [PROCESSES.Process(target=rank_main, args=(launch, body, folder)) for launch in launches]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()


def run_all(
    body: Body, folder: Path, ranks: int = 3, port: int | None = None, attempt: int | None = None
) -> tuple[list[int | None], list[str]]:
    """Exit codes and stderr of all ranks; None is a rank that did not end."""
    port = port or free_port()
    launches = [Launch("torchrun", rank, ranks, rank, "127.0.0.1", port, attempt) for rank in range(ranks)]
    with started(launches, body, folder) as processes:
        codes = wait(processes)
    return codes, [stderr(folder, rank) for rank in range(ranks)]


def wait(processes: list[ForkServerProcess]) -> list[int | None]:
    deadline_s = time.monotonic() + 100
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
    return [process.exitcode for process in processes]


def stderr(folder: Path, rank: int) -> str:
    path = folder / f"stderr-{rank}"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("body", "culprit", "code", "reason", "place"),
    [
        pytest.param(
            stopped, 1, -signal.SIGKILL, "is stopped by a signal", "stopped", marks=pytest.mark.fault(16)
        ),
        (stopped_first, 0, -signal.SIGKILL, "is stopped by a signal", "stopped_first"),
        (asleep, 2, HUNG, "outside of any collective", "oversleep"),
        (holds_interpreter, 1, -signal.SIGABRT, "though its process runs", "holds_interpreter"),
        (killed, 2, -signal.SIGKILL, "is dead", "killed"),
        (killed_first, 0, -signal.SIGKILL, "is dead", "killed_first"),
        (fails, 1, 1, "has failed (ValueError: a bug of ours)", "fails"),
    ],
)
def test_the_culprit_is_named(
    tmp_path: Path, body: Body, culprit: int, code: int, reason: str, place: str
) -> None:
    codes, errors = run_all(body, tmp_path)
    others = [rank for rank in range(3) if rank != culprit]
    assert codes == [code if rank == culprit else HUNG for rank in range(3)], errors
    for rank in others:
        lines = [line for line in errors[rank].splitlines() if "pid" in line and reason in line]
        assert lines, errors[rank]
        assert f"rank {culprit} (host " in lines[-1]
        if waited := re.search(r"others waited (\d+) s", lines[-1]):
            assert TIMEOUT_S - 1 <= int(waited[1]) <= 3 * TIMEOUT_S
        assert not any(f"rank {other} (host" in lines[-1] for other in others)
        assert "Traceback" not in errors[rank]
        assert place in (tmp_path / "hangs" / f"rank-{rank}.txt").read_text()
    stacks = [error for error in errors if "test_watchdog.py:" in error and f" {place}\n" in error]
    assert len(stacks) == 1, errors  # one rank prints them


@pytest.mark.parametrize(
    ("body", "reason"), [(slow, "rank 1 makes progress"), (long_phase, "no rank waits for another")]
)
def test_a_slow_run_goes_on(tmp_path: Path, body: Body, reason: str) -> None:
    codes, errors = run_all(body, tmp_path)
    assert codes == [0, 0, 0], errors
    assert not (tmp_path / "hangs").exists()
    assert f"going on, as {reason}" in errors[0]


def test_a_rank_that_does_not_come_to_an_end(tmp_path: Path) -> None:
    codes, errors = run_all(late, tmp_path)
    assert codes == [HUNG, HUNG, 0], errors
    for rank in (0, 1):
        assert "rank 1 (host" in errors[rank]
        assert 'in "the very end"' in errors[rank]
    assert "oversleep" in errors[0]


def test_a_stopped_first_rank_under_torchruns_agent(tmp_path: Path) -> None:
    """The agent's store goes on when rank 0 does not."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    codes, errors = run_all(stopped_first, tmp_path, 2, agent.port, attempt=0)
    assert codes == [-signal.SIGKILL, HUNG], errors
    assert "rank 0 (host " in errors[1]
    assert "is stopped by a signal" in errors[1]


def test_a_run_that_is_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    port = free_port()
    launches = [Launch("srun", rank, 2, rank, "127.0.0.1", port) for rank in range(2)]
    with started(launches, suspended, tmp_path) as processes:
        while not all("ready" in stderr(tmp_path, rank) for rank in range(2)):
            time.sleep(0.1)
            assert all(process.is_alive() for process in processes)
        time.sleep(1.8)  # rank 0 begins to listen to the others
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid or 0, number)
            time.sleep(2.5 * TIMEOUT_S if number == signal.SIGSTOP else 0)
        codes = wait(processes)
    assert codes == [0, 0], [stderr(tmp_path, rank) for rank in range(2)]


def test_a_run_of_one_process_is_left_alone(tmp_path: Path) -> None:
    launch = Launch("single", 0, 1, 0, "127.0.0.1", free_port())
    threads = threading.active_count()
    store = join(launch, 10)
    with Watchdog(launch, store, 0.1, tmp_path / "hangs") as watchdog:
        watchdog.progress("alone")
        assert threading.active_count() == threads
        assert watchdog.explain(RuntimeError("gloo: Connection closed by peer")) is None
