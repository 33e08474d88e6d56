"""One rank of a session: the real command line, in a process that says where it is and may die by itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ops.soak.board import Board
from pgm_scale.cli import main
from pgm_scale.parallel.watchdog import Watchdog

# Between two of these a crash cannot tell the difference.
OPERATIONS = ("mkdir", "link", "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "utime")


def rank_main(
    arguments: Sequence[str],
    environment: dict[str, str],
    log: Path,
    board_path: Path,
    dies_at: tuple[str, int] | None,
) -> None:
    """Run `pgm-scale` with the arguments and exit with its code. A process group and session of its own, so that
    whatever it starts can be found when it is dead.

    Args:
        dies_at: by SIGKILL, before the n-th operation on files whose description begins so.
    """
    os.setsid()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    board = Board(board_path)
    _announce_operations(board, dies_at)
    with patch.object(Watchdog, "progress", _announced(Watchdog.progress, board)):
        code = main(arguments)
    sys.exit(code)


def _announced(progress: Callable[..., None], board: Board) -> Callable[..., None]:
    def announced(self: Watchdog, what: str, step: int | None = None) -> None:
        board.progress(what)
        progress(self, what, step)

    return announced


def _announce_operations(board: Board, dies_at: tuple[str, int] | None) -> None:
    """Wrap `os`'s functions that change files; before the one that is meant die by SIGKILL."""
    count, passed, counting = 0, 0, threading.Lock()
    beginning, last = dies_at or ("", -1)

    def wrap(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def wrapped(target: Any, *rest: Any, **options: Any) -> Any:
            nonlocal count, passed
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fsdecode(target)
            with counting:
                text = f"{name} {os.path.basename(path)}"
                board.operation(text, count)
                if text.startswith(beginning):
                    if passed == last:
                        os.kill(os.getpid(), signal.SIGKILL)
                    passed += 1
                count += 1
            try:
                return original(target, *rest, **options)
            finally:
                board.operation("", count)

        return wrapped

    for name in OPERATIONS:
        setattr(os, name, wrap(name))
