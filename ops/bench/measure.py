"""Timing: sides of a comparison take turns, and a median is reported with all of its repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Resource = Literal["fp32 matmul", "bf16 matmul", "memory", "disk write"]


@dataclass(frozen=True)
class Side:
    """One way to do a piece of work.

    Attributes:
        run: does the work once; what it returns is dropped. It must wait for the device.
        work: FLOPs, bytes, tokens, ... that one run needs.
        resource: what limits it; with `work` in its unit it gives the fraction of the machine's peak. A side
            that is compared only has none.
        undo: brings back what `run` has changed; not timed.
    """

    name: str
    run: Callable[[], Any]
    work: float = 0.0
    resource: Resource | None = None
    undo: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Target:
    """What the issue asks of a row's value, and what it hopes for; `lower_is_better` for seconds and losses."""

    at_least: float
    reach: float
    lower_is_better: bool = False

    def holds(self, value: float) -> bool:
        return value <= self.at_least if self.lower_is_better else value >= self.at_least


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: the work, in words, with its sizes.
        value: the number that has the target; `unit` says of what: "x" is a ratio of two sides' times.
        seconds: all repeats of each side, by name, in the order they were run.
        work: of one run of each side, in FLOPs, bytes or tokens.
        fraction_of_peak: of each side that has a resource.
    """

    what: str
    value: float
    unit: str
    target: Target | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    fraction_of_peak: dict[str, float] = field(default_factory=dict)
    resource: Resource | None = None
    note: str = ""


def take_turns(sides: Sequence[Side], repeats: int, warm_ups: int = 1) -> dict[str, list[float]]:
    """Seconds of every repeat of every side; the order is turned round at each repeat.

    A machine's drift (other tenants, clocks) then falls on all sides alike.
    """
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for repeat in range(-warm_ups, repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            start_s = time.perf_counter()
            side.run()
            elapsed_s = time.perf_counter() - start_s
            side.undo()
            if repeat >= 0:
                seconds[side.name].append(elapsed_s)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`, by medians."""
    return statistics.median(seconds[slow]) / statistics.median(seconds[fast])
