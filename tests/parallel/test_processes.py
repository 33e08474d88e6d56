"""The stack of another thread, as the watchdog shows it."""

import threading
import time
from collections.abc import Iterator

import pytest

from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.processes import calls_of, raised_at, stack_of, thread_state
from tests.distributed import run_ranks


def _waits_here(reached: threading.Event, free: threading.Event) -> None:
    reached.set()
    free.wait()


def _resumes(reached: threading.Event, free: threading.Event) -> Iterator[None]:
    _waits_here(reached, free)
    yield


def _stack_of_a_waiting_thread(_: Mesh) -> tuple[str, ...]:
    reached, free = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: list(_resumes(reached, free)))
    thread.start()
    reached.wait()
    time.sleep(1.0)  # until it waits
    assert thread.ident is not None
    lines = stack_of(thread.ident)[0]
    free.set()
    thread.join()
    return lines


def test_a_waiting_thread_shows_its_calls_innermost_last() -> None:
    """In a process of its own: faulthandler shows 100 threads, and other tests may have left more."""
    lines = run_ranks(1, _stack_of_a_waiting_thread)
    names = [line.rpartition(" ")[2] for line in lines]
    first = names.index("_resumes")
    assert lines[first + 1] == f"{__file__}:{_waits_here.__code__.co_firstlineno + 2} _waits_here"
    assert names[first + 2] == "wait"
    assert not any("_stack_of_a_waiting_thread" in line for line in lines)  # the thread that asks


def _stacks_of_a_running_thread(_: Mesh) -> list[tuple[str, ...]]:
    """Of one that calls, returns and resumes generators all the time, while others come and go."""
    states: list[int | None] = []
    ends = threading.Event()

    def runs(depth: int) -> Iterator[int]:
        yield depth
        if depth:
            yield from runs(depth - 1)

    def work() -> None:
        states.append(thread_state())
        while not ends.is_set():
            list(runs(20))

    def come_and_go() -> None:
        while not ends.is_set():
            threading.Thread(target=lambda: None).start()

    threads = [threading.Thread(target=work), threading.Thread(target=come_and_go)]
    for thread in threads:
        thread.start()
    while not states:
        time.sleep(0.01)
    [state] = states
    assert state is not None
    stacks = [calls_of(state)[0] for _ in range(5000)]
    ends.set()
    for thread in threads:
        thread.join()
    return stacks


def test_calls_of_a_running_thread_are_read_whole() -> None:
    stacks = run_ranks(1, _stacks_of_a_running_thread)
    assert all(any(line.endswith((" work", " runs")) for line in stack) for stack in stacks)
    assert len({len(stack) for stack in stacks}) > 3


def test_an_error_shows_where_it_was_raised() -> None:
    with pytest.raises(TypeError) as caught:
        threading.Event().wait("long")  # type: ignore[arg-type]
    lines = raised_at(caught.tb)
    assert lines[0].startswith(f"{__file__}:")
    assert lines[-1].endswith(" wait")
