"""The command line in a process of its own that has imported everything before: its exit code and what it said."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Outcome(NamedTuple):
    exit_code: int
    said: str

    def assert_refused(self, text: str, exit_code: int = 2) -> None:
        """In words for its user: `text` among them."""
        assert "Traceback" not in self.said, self.said
        assert self.exit_code == exit_code, self.said
        assert text in self.said, self.said


def nothing() -> None:
    pass


def command(
    output: Path, *arguments: object, before: Callable[[], None] = nothing, timeout_s: float = 120
) -> Outcome:
    """`pgm-scale ARGUMENTS`, after `before` (which must be picklable) has been called in its process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgm_scale.training.loop", "megatron.core.parallel_state"])
    process = context.Process(target=_main, args=(output, [str(word) for word in arguments], before))
    process.start()
    process.join(timeout_s)
    assert process.exitcode is not None, f"it hangs: {output.read_text()}"
    return Outcome(process.exitcode, output.read_text(errors="replace"))


def _main(output: Path, arguments: list[str], before: Callable[[], None]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from pgm_scale.cli import main

    torch.set_num_threads(1)
    before()
    sys.exit(main(arguments))
