"""The table and the JSON of a bench run."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ops.bench.machine import Machine
from ops.bench.measure import Resource, Row, Target

HEADER = "| what | value | target | holds | of the peak | median of the repeats (least to most, how many) |"


@dataclass
class Report:
    """What one run has measured on one device.

    Attributes:
        machine: with the peaks before the rows.
        rows: by module, in the order they were measured.
        failures: by module, the error that ended it; the rows before it stay.
        peaks_after: the same peaks, measured again behind the last row.
    """

    machine: Machine
    date: str
    commit: str
    versions: dict[str, str]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    peaks_after: dict[Resource, float] = field(default_factory=dict)

    @property
    def missed(self) -> list[Row]:
        """The rows whose value is not what the issue asks for at least."""
        rows = (row for rows in self.rows.values() for row in rows)
        return [row for row in rows if row.target is not None and not row.target.holds(row.value)]

    @property
    def file_stem(self) -> str:
        """The device's name, fit for a file."""
        return re.sub(r"[^a-z0-9]+", "-", self.machine.name.lower()).strip("-")

    def to_json(self) -> dict[str, Any]:
        """Everything: all repeats, work, peaks before and after."""
        return {
            **dataclasses.asdict(self),
            "machine": {**dataclasses.asdict(self.machine), "device": str(self.machine.device)},
        }

    def to_markdown(self) -> str:
        modules = [*self.rows, *(name for name in self.failures if name not in self.rows)]
        lines = [f"# {self.machine.name}", "", self._origin(), "", *self._peaks()]
        lines += ["", HEADER, "|---|---|---|---|---|---|"]
        for module in modules:
            lines += [_line(row) for row in self.rows.get(module, [])]
            if module in self.failures:
                lines.append(f"| **{module} failed** | {_cell(self.failures[module])} | | | | |")
        return "\n".join(lines) + "\n"

    def _origin(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.date}, commit {self.commit}, {versions}."

    def _peaks(self) -> Sequence[str]:
        lines = ["| peak | before the rows | after them |", "|---|---|---|"]
        for resource, before in self.machine.peaks.items():
            after = self.peaks_after.get(resource)
            lines.append(f"| {resource} | {_rate(resource, before)} | {_rate(resource, after)} |")
        return lines


def _line(row: Row) -> str:
    fractions = ", ".join(f"{name} {fraction:.0%}" for name, fraction in row.fraction_of_peak.items())
    if fractions and row.resource is not None:
        fractions += f" ({row.resource})"
    repeats = ", ".join(f"{name} {_spread(seconds)}" for name, seconds in row.seconds.items())
    what = f"{row.what}. {row.note}" if row.note else row.what
    cells = (what, _value(row.value, row.unit), *_target(row), fractions, repeats)
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _target(row: Row) -> tuple[str, str]:
    """What was asked for, and whether it is there."""
    if row.target is None:
        return "", ""
    bound = "at most" if row.target.lower_is_better else "at least"
    wanted = f"{bound} {_value(row.target.at_least, row.unit)}, reach {_value(row.target.reach, row.unit)}"
    reach = Target(row.target.reach, row.target.reach, row.target.lower_is_better)
    state = "reached" if reach.holds(row.value) else "yes" if row.target.holds(row.value) else "**no**"
    return wanted, state


def _value(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.3g}%"
    number = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return number + unit if unit == "x" else f"{number} {unit}".rstrip()


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3g} s ({min(seconds):.3g} to {max(seconds):.3g}, {len(seconds)})"


def _rate(resource: Resource, rate: float | None) -> str:
    if rate is None:
        return ""
    if "matmul" in resource:
        return f"{rate / 1e9:,.0f} GFLOP/s"
    return f"{rate / 1e9:.2f} GB/s"


def _cell(text: str) -> str:
    """On one line and without bars, as a table's cell must be."""
    return " ".join(text.replace("|", "\\|").split())
