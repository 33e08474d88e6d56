"""What the kernel and the interpreter know of a process that no longer speaks for itself."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from pgm_scale.checkpoint.lock import Holder

_SHOWN_FRAMES = 30
_COMMUNICATING = ("/torch/distributed/", "/deepspeed/", "/megatron/core/", "/pgm_scale/parallel/")
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


def stack_of(thread: int) -> tuple[tuple[str, ...], bool]:
    """The stack of a thread as lines, innermost call last, and whether it waits for other ranks.

    Autograd's threads, which Python did not start, count as part of it: hooks of the backward pass run there.
    No source lines, as reading them might hang too.
    """
    others = {other.ident for other in threading.enumerate()} - {thread}
    found = sys._current_frames()
    frames = [found.pop(thread), *(frame for ident, frame in found.items() if ident not in others)]
    lines = [line for frame in frames for line in _lines(frame)]
    waits = any(folder in frame.f_code.co_filename for frame in frames for folder in _COMMUNICATING)
    return tuple(lines), waits


def _lines(innermost: FrameType) -> Sequence[str]:
    calls: list[str] = []
    frame: FrameType | None = innermost
    while frame is not None and len(calls) < _SHOWN_FRAMES:
        calls.append(_line(frame, frame.f_lineno))
        frame = frame.f_back
    return calls[::-1]


def raised_at(trace: TracebackType) -> tuple[str, ...]:
    """The stack of an error, as `stack_of` gives it."""
    return tuple(_line(frame, number) for frame, number in traceback.walk_tb(trace))[-_SHOWN_FRAMES:]


def _line(frame: FrameType, number: int) -> str:
    return f"{frame.f_code.co_filename}:{number} {frame.f_code.co_qualname}"
