"""Damage to bytes, as hypothesis draws it: flipped, overwritten, cut out, cut off, inserted, repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from pgm_scale.errors import UserError

Damage = Callable[[bytes], bytes]


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """A change of one place, given as a share of the length, so that it fits any file."""
    place = draw(st.floats(0, 1, exclude_max=True))
    kind = draw(st.sampled_from(["flip", "overwrite", "cut out", "cut off", "insert", "repeat"]))
    bit = draw(st.integers(0, 7))
    size = draw(st.sampled_from([1, 4, 64, 512]))
    fill = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8), b"9" * 12]))

    def damage(content: bytes) -> bytes:
        start = int(place * len(content))
        before, after = content[:start], content[start:]
        if kind == "flip":
            return before + bytes([after[0] ^ 1 << bit]) + after[1:] if after else content
        if kind == "overwrite":
            return before + fill + after[len(fill) :]
        if kind == "cut out":
            return before + after[size:]
        if kind == "cut off":
            return before
        return before + (fill if kind == "insert" else after[:size]) + after

    damage.__qualname__ = f"{kind} at {place} (bit {bit}, {size} bytes, {fill!r})"  # for hypothesis' report
    return damage


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What a function gives, or the one short line with which it refuses; else is a fault."""
    try:
        return function(*arguments), None
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert 0 < len(message) < 2000, message
    return None, message
