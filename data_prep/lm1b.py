"""LM1B as published (FACTS 3.8): the hub's train and test splits, the latter for validation, detokenised."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.readers import InputFile, Reading, fingerprint_files, read_documents
from data_prep.sources import TRAIN, VALIDATION, UnitSize

HUB_REPOSITORY = "billion-word-benchmark/lm1b"

# In order: each works on what the one before it left.
_RULES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(https?) : / / ", r"\1://"),
        (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."),
        (r" \? ", "? "),
        (r" \?$", "?"),
        (r" ! ", "! "),
        (r" !$", "!"),
        (r" , ", ", "),
        (r" : ", ": "),
        (r" ; ", "; "),
        (r" / ", "/"),
        (r'" ([^"]+) "', r'"\1"'),
        (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"([$£]) ", r"\1"),
    ]
]


def detokenise(text: str) -> str:
    """Undo the spaces that the benchmark's tokenisation put around punctuation."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


class LM1BSource:
    unit_size = UnitSize()

    def __init__(
        self,
        train_files: Sequence[InputFile],
        test_files: Sequence[InputFile],
        reading: Reading,
        revision: str | None = None,
    ) -> None:
        """`revision` is the commit that the files come from, where they come from a hub."""
        self._files = {TRAIN: train_files, VALIDATION: test_files}
        self._reading = reading
        self._revision = revision
        self.detokenise = detokenise

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "lm1b",
            "revision": self._revision,
            "separation": self._reading.separation,
            "text_field": self._reading.field,
            "input": {split: fingerprint_files(files) for split, files in self._files.items()},
        }

    def total_documents(self) -> None:
        return None

    def documents(self) -> Iterator[tuple[str, str]]:
        for split, files in self._files.items():
            for file in files:
                yield from ((split, text) for text in read_documents(file, self._reading))
