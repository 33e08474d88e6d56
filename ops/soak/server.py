"""A process that has imported the library once, and is forked for each rank: its imports take seconds.

`multiprocessing` has one such server a program, whose imports are whatever was asked for first.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NoReturn, Self

_IMPORTED = (
    "ops.soak.rank",
    "pgm_scale.training.loop",
    "pgm_scale.training.samples",
    "pgm_scale.parallel.pipeline",
    "pgm_scale.parallel.tensor_layers",
    "megatron.core.parallel_state",
)
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class ForkServer:
    """`fork` a process, ask for its `exit_code`; those that are left end with the server."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # its imports are done
        self._exit_codes: dict[int, int] = {}

    def fork(self, function: Callable[..., None], *arguments: Any) -> int:
        """The process id of a new process that calls the function, which is known by its name."""
        self._connection.send((function, arguments))
        pid = self._connection.recv()
        self._exit_codes.pop(pid, None)  # an earlier one may have had this id
        return pid

    def exit_code(self, pid: int) -> int | None:
        """None while it lives; minus the signal that ended it. Of the newest process with this id."""
        if pid not in self._exit_codes:
            self._connection.send(None)
            self._exit_codes |= self._connection.recv()
        return self._exit_codes.get(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection) -> None:
    """Forks and answers, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end decides
    os.environ.update(_ENVIRONMENT)
    warnings.simplefilter("ignore")
    for name in _IMPORTED:
        importlib.import_module(name)
    connection.send("ready")
    living: set[int] = set()
    try:
        while True:
            if (request := connection.recv()) is None:
                ended = _ended(living)
                living -= ended.keys()
                connection.send(ended)
                continue
            if (pid := os.fork()) == 0:
                connection.close()
                _run(*request)
            living.add(pid)
            connection.send(pid)
    except EOFError:
        for pid in living:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)  # the libraries take seconds to end


def _ended(living: set[int]) -> dict[int, int]:
    found = {}
    for pid in living:
        waited, status = os.waitpid(pid, os.WNOHANG)
        if waited:
            found[pid] = os.waitstatus_to_exitcode(status)
    return found


def _run(function: Callable[..., None], arguments: tuple[Any, ...]) -> NoReturn:
    """As the interpreter ends: with the code of SystemExit, or a traceback and 1."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        function(*arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
