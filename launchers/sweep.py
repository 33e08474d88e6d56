"""A sweep: one `section.key=a,b` in a command's words is a run for each value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*=")


def expand(words: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    """All combinations of the values, each with a suffix that names it ("" where nothing is swept).

    Commas in brackets, braces or quotes belong to a value: `optimizer.betas=[0.9,0.99],[0.9,0.95]` are two.
    """
    choices = [_values(word) for word in words]
    swept = [index for index, values in enumerate(choices) if len(values) > 1]
    return [
        (chosen, "-".join(_label(chosen[index]) for index in swept)) for chosen in itertools.product(*choices)
    ]


def _values(word: str) -> list[str]:
    found = _OVERRIDE.match(word)
    if found is None:
        return [word]
    return [found[0] + value for value in _split(word[found.end() :])]


def _split(text: str) -> list[str]:
    """At the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _label(override: str) -> str:
    """For a folder's name: `optimizer.learning_rate=1e-4` is learning_rate=1e-4."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={re.sub(r'[^A-Za-z0-9._+-]+', '_', value)}"
