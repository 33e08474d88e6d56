"""`pgm-scale runs`: what the runs on this disk are at."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgm_scale.watching.runs import RunStatus

_FILE_WIDTH = 200  # characters of the table where there is no terminal


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "runs",
        help="list runs with state, step, speed, loss and last checkpoint",
        description="One line a run folder, from its heartbeat, lock and checkpoint names; no Slurm "
        "is asked. A run is stalled when its process lives but has made no progress for longer than "
        "parallel.timeout_s, and killed when it is gone without having said how it ended.",
    )
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="*", help="run folders, or folders that hold such (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    parser.add_argument(
        "--watch", metavar="S", type=_seconds, help="on a terminal: look again every S seconds, until Ctrl-C"
    )
    parser.set_defaults(run=_runs)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return seconds


def _runs(options: argparse.Namespace) -> None:
    import dataclasses
    import json
    import sys
    from pathlib import Path

    from pgm_scale.errors import UserError
    from pgm_scale.files import finite
    from pgm_scale.watching.runs import find_runs, read_status

    if options.watch and (options.json or not sys.stdout.isatty()):
        raise UserError("--watch is for a terminal, and not for --json; leave it out and call `runs` again")
    folders = options.folders or ["runs"]
    if not options.folders and not Path("runs").is_dir():
        raise UserError("there is no folder runs here; give folders of runs, or folders that hold such")

    def look() -> list[RunStatus]:
        return [read_status(folder) for folder in find_runs(folders)]

    if options.json:
        print(json.dumps([finite(dataclasses.asdict(status)) for status in look()], indent=1))
        return
    _show(look, options.watch, folders)


def _show(look: Callable[[], list[RunStatus]], watch_s: float | None, folders: Sequence[str]) -> None:
    import contextlib
    import time

    from rich.console import Console, RenderableType
    from rich.live import Live

    from pgm_scale.watching.table import runs_table

    def content() -> RenderableType:
        statuses = look()
        return runs_table(statuses) if statuses else f"no runs in {', '.join(folders)}"

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_FILE_WIDTH)
    if watch_s is None:
        console.print(content())
        return
    with contextlib.suppress(KeyboardInterrupt), Live(content(), console=console, screen=True) as live:
        while True:
            time.sleep(watch_s)
            live.update(content(), refresh=True)
