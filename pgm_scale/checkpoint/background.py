"""A rank's write that goes on while it trains, in a thread that takes little but what training leaves over.

The hash costs 0.7 s of one core a GB. Where training leaves a core, it costs training nothing; where training keeps
all cores busy, the lowest priority spreads it over some seconds (2.4 times as fast as the idle class would). While
training waits for it, it runs at full speed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

import torch

from pgm_scale.checkpoint.fragments import FileEntry

_POLL_S = 0.5
Write = Callable[[Callable[[str], None], Callable[[], None]], FileEntry]


class BackgroundWrite:
    """Started by its construction. It takes part in no collective: the ranks agree on it from outside.

    Values are copied to the host here too, beside the forward and backward passes of the next step, which only
    read them: an update waits for `wait_until_copied`.

    Args:
        write: is given `progress` and `copied`, see `write_fragments`.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._entry: FileEntry | None = None
        self._error: Exception | None = None
        self._copied, self._ended, self._unwanted = threading.Event(), threading.Event(), threading.Event()
        self._chunks = 0
        self.seconds = 0.0  # that it has taken, once it has ended
        self._stream = None
        if torch.cuda.is_initialized():  # copies run beside the GPU's later work, after what it does now
            self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
        try:
            threading.Thread(target=self._run, name="checkpoint-write", daemon=True).start()
        except RuntimeError as error:  # no more threads: for `result`, where all ranks hear of it
            self._error = OSError(f"no thread for the write in the background ({error})")
            self._copied.set()
            self._ended.set()

    @property
    def is_running(self) -> bool:
        return not self._ended.is_set()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def wait_until_copied(self, progress: Callable[[str], None]) -> None:
        """Afterwards the values may change. Returns at once when the write has failed."""
        self._wait(self._copied, progress)

    def result(self, progress: Callable[[str], None]) -> FileEntry:
        """Wait for the end. Raises: what the write has raised."""
        self._wait(self._ended, progress)
        if self._error is not None:
            raise self._error
        assert self._entry is not None
        return self._entry

    def give_up(self) -> None:
        """Stop at the next chunk, and wait for that."""
        self._unwanted.set()
        self._ended.wait()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # Linux has a priority a thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        start_s = time.perf_counter()
        try:
            with torch.cuda.stream(self._stream):
                self._entry = self._write(self._advance, self._copied.set)
        except Exception as error:
            self._error = error
        finally:
            self.seconds = time.perf_counter() - start_s
            self._copied.set()
            self._ended.set()

    def _advance(self, what: str) -> None:
        self._chunks += 1
        if self._unwanted.is_set():
            raise InterruptedError("given up")

    def _wait(self, event: threading.Event, progress: Callable[[str], None]) -> None:
        """`progress` is told only when there is some: a disk that hangs is for the watchdog."""
        seen = -1
        while not event.wait(_POLL_S):
            if self._chunks != seen:
                seen = self._chunks
                progress("waiting for the checkpoint that is being written")
