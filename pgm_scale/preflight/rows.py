"""What a check finds, and how one that fails or hangs is kept from stopping the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from pgm_scale.errors import UserError
from pgm_scale.parallel.rendezvous import within

Status = Literal["ok", "warning", "bad"]
SEVERITY: dict[Status, int] = {"ok": 0, "warning": 1, "bad": 2}
CHECK_TIMEOUT_S = 60.0  # for what takes well under a second on a machine that is well

_DIGITS = re.compile(r"(.*?)(\d+)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One thing that was looked at on one rank. A `bad` one excludes the node, a `warning` does not.

    Attributes:
        to_do: what a person should do about it, where it is not ok.
        number: `value` as a number, where it is one.
    """

    check: str
    value: str
    status: Status = "ok"
    to_do: str = ""
    number: float | None = None


def guarded(
    check: str, look: Callable[[], Iterable[Row]], timeout_s: float | None = CHECK_TIMEOUT_S
) -> tuple[Row, ...]:
    """The rows of `look`, or one bad row if it fails or takes longer than `timeout_s`; raises nothing."""
    try:
        return tuple(look()) if timeout_s is None else within(timeout_s, lambda: tuple(look()))
    except TimeoutError:
        text, to_do = f"no answer within {timeout_s or 0:g} s", "look at its file systems and its kernel log"
    except UserError as error:
        text, to_do = " ".join(str(error).split()), ""
    except Exception as error:
        text, to_do = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "look at this node"
    return (Row(check, text, "bad", to_do),)


def worst(statuses: Iterable[Status]) -> Status:
    return max(statuses, key=SEVERITY.__getitem__, default="ok")


def fold_names(names: Iterable[str]) -> str:
    """Node names as Slurm writes and reads them: gpu[001-003,007],login1."""
    groups: dict[tuple[str, int], list[int]] = {}
    for name in sorted(set(names)):
        match = _DIGITS.fullmatch(name)
        prefix, digits = match.groups() if match else (name, "")
        # Numbers of one width stand in one bracket; an unpadded 9 and 10 do not.
        groups.setdefault((prefix, len(digits)), []).append(int(digits) if digits else 0)
    return ",".join(_folded(prefix, width, numbers) for (prefix, width), numbers in groups.items())


def _folded(prefix: str, width: int, numbers: list[int]) -> str:
    if width == 0:
        return prefix
    if len(numbers) == 1:
        return f"{prefix}{numbers[0]:0{width}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = (
        f"{run[0]:0{width}}" if len(run) == 1 else f"{run[0]:0{width}}-{run[-1]:0{width}}" for run in runs
    )
    return f"{prefix}[{','.join(texts)}]"
