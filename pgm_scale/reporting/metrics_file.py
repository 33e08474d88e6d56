"""Reading the `metrics.jsonl` of a run that is finished, still going, was killed or was resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pgm_scale.errors import UserError
from pgm_scale.files import read_bounded

_MOST_BYTES = 1 << 32


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records by step; of a step that was repeated, the last. A last line without its end is left out.

    Raises:
        UserError: the file is missing, or one of its whole lines is no record: the line is named.
    """
    try:
        lines = read_bounded(path, _MOST_BYTES).split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder of a run") from None
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _record(line)
        except ValueError as error:
            if number == len(lines):  # a writer is in the middle of it, or was killed there
                break
            raise UserError(f"{path}: line {number} is damaged ({error}); delete that line") from None
        records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    step = record.get("step")
    if type(step) is not int or not 0 <= step < 1 << 63:
        raise ValueError("no whole number as its step")
    return record


def number(value: Any) -> float | None:
    """A finite number as a float; None for everything else, which a picture leaves out."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has integers of any size
        return None
