"""The table of `pgm-scale runs`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pgm_scale.watching.runs import RunStatus

_COLUMNS = (
    ("run", "left"),
    ("state", "left"),
    ("step", "right"),
    ("loss", "right"),
    ("tokens/s", "right"),
    ("val. ppl", "right"),
    ("checkpoint", "right"),
    ("job", "left"),
    ("restarts", "right"),
    ("updated", "right"),
)
_STYLES = {
    "starting": "cyan",
    "running": "green",
    "finished": "green",
    "preempted": "yellow",
    "stalled": "bold red",
    "failed": "red",
    "killed": "red",
    "damaged": "red",
}


def runs_table(statuses: Sequence[RunStatus], now_s: float | None = None) -> RenderableType:
    """One row a run, and below the table a line for each that has something to tell; ages are as of `now_s`."""
    now_s = time.time() if now_s is None else now_s
    table = Table(box=None, pad_edge=False)
    for name, justify in _COLUMNS:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for status in statuses:
        state = status.state
        if status.doing not in (None, "training", "starting"):
            state += f" ({status.doing})"  # type: ignore[assignment]
        table.add_row(
            _text(status.folder),
            Text(state, style=_STYLES.get(status.state, "")),
            *(_text(cell) for cell in _cells(status, now_s)),
        )
    notes = [_text(f"{status.folder}: {status.note}") for status in statuses if status.note]
    return Group(table, *notes)


def _cells(status: RunStatus, now_s: float) -> tuple[str, ...]:
    checkpoint = "-"
    if status.last_checkpoint_step is not None:
        checkpoint = f"{status.last_checkpoint_step} ({_age(status.last_checkpoint_unix_time_s, now_s)})"
    return (
        "-" if status.step is None else f"{status.step}/{status.total_steps or '?'}",
        _number(status.loss, ".3f"),
        _number(status.tokens_per_second, ",.0f"),
        _number(status.validation_perplexity, ".2f"),
        checkpoint,
        status.job or "-",
        "-" if status.restarts is None else str(status.restarts),
        _age(status.updated_unix_time_s, now_s),
    )


def _text(text: str) -> Text:
    """A run's name may hold markup, or codes that a terminal obeys."""
    return Text("".join(character if character.isprintable() else "?" for character in text))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _age(unix_time_s: float | None, now_s: float) -> str:
    if unix_time_s is None:
        return "-"
    seconds = max(0.0, now_s - unix_time_s)
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"
