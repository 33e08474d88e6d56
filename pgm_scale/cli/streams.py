"""The standard streams of a command: what it says there must neither end nor damage what it does.

A reader that goes away (`| head`, a closed terminal) or a full disk under a log would otherwise end a training
between two checkpoints; and where a stream is closed from the start, the next file that is opened, maybe a
checkpoint, would get its number and be written to by all that talks to file descriptor 2.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from pgm_scale.errors import UserError


class _Watched:
    """A stream whose errors are answered by us."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._answer(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._answer(error)

    def _answer(self, error: OSError) -> None:
        """Drop what cannot be written now; a disk that has room again takes the next lines."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Results(_Watched):
    def _answer(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        raise UserError(f"stdout cannot be written ({error.strerror}): the output is not complete") from None


@contextmanager
def forgiving(name: Literal["stdout", "stderr"]) -> Iterator[None]:
    """Errors of this stream stop nothing, and do not change the exit code either."""
    with _replaced(name, _Watched):
        yield


@contextmanager
def written_results() -> Iterator[None]:
    """Results on stdout are written when this ends.

    Raises:
        BrokenPipeError: their reader has gone.
        UserError: they cannot be written.
    """
    with _replaced("stdout", _Results):
        yield
        sys.stdout.flush()


@contextmanager
def _replaced(name: str, kind: type[_Watched]) -> Iterator[None]:
    stream: TextIO = getattr(sys, name)
    setattr(sys, name, kind(stream))
    try:
        yield
    finally:
        setattr(sys, name, stream)
        try:
            stream.flush()
        except OSError:
            _drop(stream)


def open_closed_streams() -> None:
    """Open /dev/null in the place of standard streams that were closed (`2>&-`)."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _drop(stream: TextIO) -> None:
    """Send what it still holds nowhere: the interpreter's own flush at the exit would fail again, and say so."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
