"""A picture before it is drawn, in plain numbers: what `report.json` holds and `drawing.py` draws."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

Numbers = list[float | None]


@dataclass(frozen=True)
class Axis:
    """Attributes: key: names the numbers along it; label: for people, with the unit."""

    key: str
    label: str
    log: bool = False


@dataclass(frozen=True)
class Line:
    """Points by growing x; None is not drawn.

    Attributes:
        x: numbers along each of the panel's x axes, by the axis's key; as many as `y`.
        error: half the height of the error bars.
        point_labels: written beside the points.
        color, dash: equal for lines of equal meaning in all panels.
        faint: raw values behind a smoothed line, without an entry in the legend.
    """

    label: str
    x: dict[str, Numbers]
    y: Numbers
    error: Numbers | None = None
    point_labels: list[str] | None = None
    color: int = 0
    dash: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a place of each x axis."""

    x: dict[str, float | None]
    label: str
    color: int = 0


@dataclass(frozen=True)
class Panel:
    """One picture an x axis. `key` names the files."""

    key: str
    title: str
    x_axes: tuple[Axis, ...]
    y_axis: Axis
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)


def smoothed(values: Sequence[float], breaks: Sequence[int] = ()) -> list[float]:
    """The mean of each value and its neighbours: those at most a fiftieth of the whole away.

    Args:
        breaks: indices at which something new begins, over which no mean is taken.
    """
    half = len(values) // 50
    sums = [0.0, *itertools.accumulate(values)]
    bounds = [0, *breaks, len(values)]
    result = []
    for start, stop in itertools.pairwise(bounds):
        for index in range(start, stop):
            low, high = max(start, index - half), min(stop, index + half + 1)
            result.append((sums[high] - sums[low]) / (high - low))
    return result
