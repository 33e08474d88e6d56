"""When a run must stop: a signal only sets a flag; the ranks agree on it at the next step and save together.

And when that is too late: a save is started only if it ends before the scheduler ends the job.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Self

# Slurm and cloud schedulers send TERM; submitit and `sbatch --signal` send USR2; INT is a person's Ctrl-C, and HUP
# a terminal that was closed, unless `nohup` has it ignored.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_SAVE_FACTOR, _SAVE_MARGIN_S = 1.5, 5.0  # a save may take so much longer than the longest before it
_OVERTIME_S = 300.0  # more than a scheduler takes to end a job whose time is over


def answered_signals() -> list[signal.Signals]:
    """`STOP_SIGNALS`, without the hang-up where it is ignored."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


class StopFlag:
    """Raised by the first of `STOP_SIGNALS`; later ones change nothing, so a save is never interrupted.

    Entered before torch is imported, which takes seconds: a job that is told to stop while it starts is requeued
    too. A launcher may have blocked the signals until then; those are ignored afterwards, as one that comes while
    the process ends must not change its exit code. Ctrl-C ends the process as long as `answers_interrupts` is
    False, when there is nothing to save yet.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.was_interrupted = False  # by Ctrl-C, which has raised KeyboardInterrupt
        self._answers_interrupts = False
        self._previous: dict[int, object] = {}
        self._blocked: set[int] = set()

    @property
    def answers_interrupts(self) -> bool:
        return self._answers_interrupts

    @answers_interrupts.setter
    def answers_interrupts(self, answers: bool) -> None:
        """Raises: KeyboardInterrupt: it was raised before, and lost in a library that catches all while it is
        imported, and may now be half there.
        """
        self._answers_interrupts = answers
        if self.was_interrupted:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        for number in answered_signals():
            self._previous[number] = signal.signal(number, self._on_signal)
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        except KeyboardInterrupt:  # it was waiting
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        for number, handler in self._previous.items():
            # Blocking it again would not do: threads that were started meanwhile have it unblocked.
            signal.signal(number, signal.SIG_IGN if number in self._blocked else handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.answers_interrupts:
            self.was_interrupted = True
            raise KeyboardInterrupt
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name


class JobEnd:
    """The end of this process's job, from SLURM_JOB_END_TIME (seconds of Unix time); without it there is none.

    A job that lives on long after it was given more time, and its new end is not known.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        end = environment.get("SLURM_JOB_END_TIME", "")
        self._end_unix_s = float(end) if end.isdecimal() else float("inf")

    @property
    def left_s(self) -> float:
        left_s = self._end_unix_s - time.time()
        return left_s if left_s > -_OVERTIME_S else float("inf")

    def is_too_near(self, save_s: float) -> bool:
        """Whether a save might not end in time, if one takes `save_s` (0: not known yet)."""
        return self.left_s < _SAVE_FACTOR * save_s + _SAVE_MARGIN_S
