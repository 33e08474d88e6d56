"""Measured tables in the README, each between two markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pgm_scale.files import atomic_write_bytes

ROOT = Path(__file__).resolve().parent.parent


def write_section(name: str, lines: Sequence[str]) -> None:
    """Replace what is between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    path, markers = ROOT / "README.md", (f"<!-- {name}:begin -->", f"<!-- {name}:end -->")
    before, _, rest = path.read_text(encoding="utf-8").partition(markers[0])
    _, _, after = rest.partition(markers[1])
    assert after, f"{path} has no {' ... '.join(markers)} for the tables"
    atomic_write_bytes(path, (before + "\n".join([markers[0], *lines, markers[1]]) + after).encode())
