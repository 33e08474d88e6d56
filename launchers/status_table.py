"""Statuses of jobs as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from launchers.status import JobStatus
from pgm_scale.files import finite
from pgm_scale.watching.heartbeat import Heartbeat

_UNLIMITED_COLUMNS = 2000


def print_json(statuses: Sequence[JobStatus]) -> None:
    print(json.dumps(finite([dataclasses.asdict(status) for status in statuses]), indent=2))


def print_table(statuses: Sequence[JobStatus]) -> None:
    """One line a job where nobody looks at the width: into a file or a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", "run", "command", "state", "step", "restarts", "nodes", "time", "left"):
        table.add_column(heading, overflow="fold")
    for status in statuses:
        table.add_row(*(Text(cell) for cell in _row(status)))  # node[1-2] is no markup
    console = Console()
    (console if console.is_terminal else Console(width=_UNLIMITED_COLUMNS)).print(table)


def _row(status: JobStatus) -> list[str]:
    return [
        status.job_id,
        _place(status),
        status.command.split(" ")[0],
        f"{status.state} ({status.reason})" if status.reason else status.state,
        _step(status.heartbeat),
        "" if status.restarts is None else str(status.restarts),
        status.node_list or ("" if status.nodes is None else str(status.nodes)),
        duration(status.run_s) if status.run_s else "",
        duration(status.time_left_s),
    ]


def _place(status: JobStatus) -> str:
    """The run folder as one would type it, or the job's name."""
    if status.run_folder is None:
        return status.name
    path = Path(status.run_folder)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _step(heartbeat: Heartbeat | None) -> str:
    if heartbeat is None:
        return ""
    loss = "" if heartbeat.loss is None else f" loss {heartbeat.loss:.3f}"
    return f"{heartbeat.step}/{heartbeat.total_steps}{loss}"


def duration(seconds: float | None) -> str:
    """3:05, 2:03:05, 4-02:03:05: as Slurm writes times."""
    if seconds is None:
        return ""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}-{hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
