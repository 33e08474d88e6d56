"""What the kernel and the interpreter know of a process that no longer speaks for itself."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from pgm_scale.holder import Holder

_SHOWN_FRAMES = 30
_COMMUNICATING = ("/torch/distributed/", "/deepspeed/", "/megatron/core/", "/pgm_scale/parallel/")
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x", re.MULTILINE)  # as faulthandler writes them
_FRAME = re.compile(r'^  File "(.*)", line (\S+) in (.*)$', re.MULTILINE)
_ABORT_S = 0.5
_DEAD = "is dead"
_UNKNOWN = "sends no sign of life"
_STATES = {
    "": _DEAD,
    "Z": _DEAD,
    "X": _DEAD,
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
    "D": "is stuck in the kernel (disk, network file system or GPU driver)",
}


def silence(process: Holder) -> str:
    """Why a process is not heard of, as far as this machine knows."""
    if process.machine != Holder.here().machine:
        return _UNKNOWN
    return _STATES.get(_state(process), f"{_UNKNOWN}, though its process runs")


def can_be_ended(process: Holder) -> bool:
    """Whether it is there, on this machine."""
    return silence(process) not in (_DEAD, _UNKNOWN)


def end(processes: Iterable[Holder]) -> None:
    """End processes of this machine; SIGABRT first, which prints a stack even if Python does not run."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        found = [process for process in processes if can_be_ended(process)]
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process.pid, number)
        time.sleep(_ABORT_S if found else 0)


def _state(process: Holder) -> str:
    """The kernel's letter for the state of a process on this machine; "" when it is gone."""
    try:
        state, *fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return state if fields[18] == process.start_ticks else ""


def thread_state() -> int | None:
    """The interpreter's own record of the calling thread, for `calls_of`; None where it cannot be read."""
    python = ctypes.PyDLL(None)
    if not hasattr(python, "_Py_DumpTraceback"):
        return None
    python.PyThreadState_Get.restype = ctypes.c_void_p
    return python.PyThreadState_Get()


def calls_of(state: int) -> tuple[tuple[str, ...], bool]:
    """What `stack_of` gives, of the one thread with this state, which must be alive.

    Safe at any time, as the interpreter's lock is held. The dump of all threads is not: it follows a list to which
    threads of C++ add themselves without that lock, in Python 3.11 before they are complete, and crashes if it
    meets one (seen about once in a day of tests).
    """
    python = ctypes.PyDLL(None)
    text = _dumped(lambda file: python._Py_DumpTraceback(file, ctypes.c_void_p(state)))
    stack = _calls(text)
    return stack, _waits([stack])


def stack_of(thread: int) -> tuple[tuple[str, ...], bool]:
    """The stack of a thread as lines, innermost call last, and whether it waits for other ranks.

    Autograd's threads, which Python did not start, count as part of it: hooks of the backward pass run there.
    No source lines, as reading them might hang too. For a process that seems to hang: see `calls_of`.
    """
    others = {other.ident for other in threading.enumerate()} - {thread}
    found = _all_stacks()
    stacks = [found.pop(thread, ()), *(stack for ident, stack in found.items() if ident not in others)]
    return tuple(line for stack in stacks for line in stack), _waits(stacks)


def _all_stacks() -> dict[int, tuple[str, ...]]:
    """The stack of every thread by its number, read without a pause.

    By faulthandler, which does not let go of the interpreter. Frame objects of a thread that goes on running
    while they are followed do not stay valid (Python 3.11 hands out freed memory as frames).
    """
    stacks = {}
    for part in _THREAD.split(_dumped(faulthandler.dump_traceback))[1:]:
        number, _, frames = part.partition(" ")
        stacks[int(number, 16)] = _calls(frames)
    return stacks


def _dumped(dump: Callable[[int], Any]) -> str:
    file = os.memfd_create("stacks")
    try:
        dump(file)
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")
    finally:
        os.close(file)


def _calls(frames: str) -> tuple[str, ...]:
    """Lines of one dumped thread, innermost call last."""
    calls = [f"{path}:{line} {name}" for path, line, name in _FRAME.findall(frames)[:_SHOWN_FRAMES]]
    return tuple(calls[::-1])


def _waits(stacks: Iterable[tuple[str, ...]]) -> bool:
    """Whether the innermost call of one of them is one that communicates."""
    return any(
        folder in stack[-1].rpartition(":")[0] for stack in stacks if stack for folder in _COMMUNICATING
    )


def raised_at(trace: TracebackType) -> tuple[str, ...]:
    """The stack of an error, as `stack_of` gives it."""
    calls = [(frame.f_code, line) for frame, line in traceback.walk_tb(trace)]
    return tuple(f"{code.co_filename}:{line} {code.co_name}" for code, line in calls[-_SHOWN_FRAMES:])
