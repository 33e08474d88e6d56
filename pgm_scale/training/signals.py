"""A signal only sets a flag; the ranks agree on it at the next step boundary and save together."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

# Slurm and cloud schedulers send TERM; submitit and `sbatch --signal` send USR2; INT is a person's Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Raised by the first of `STOP_SIGNALS`; later ones change nothing, so a save is never interrupted."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
