"""Where documents come from, and the ordered units of work they are dealt out in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from data_prep.progress import tracked
from data_prep.readers import Reading, find_files, fingerprint_files, read_documents
from data_prep.units import Unit
from pgm_scale.errors import UserError

TRAIN, VALIDATION = SPLITS = ("train", "validation")
MAP_BATCH_DOCUMENTS = 1000  # the published packing joins documents within batches of this many (FACTS 3.8)


@dataclass(frozen=True)
class UnitSize:
    """A unit is full at `documents`, or at `characters` where that is set. The packing drops the last tokens of
    a unit, so its size is part of what decides the output."""

    documents: int = MAP_BATCH_DOCUMENTS
    characters: int | None = None


class DocumentSource(Protocol):
    """Documents in an order that is always the same.

    `detokenise` is applied to each document by the workers, so it must be a function of a module.
    """

    @property
    def unit_size(self) -> UnitSize: ...

    @property
    def detokenise(self) -> Callable[[str], str] | None: ...

    def describe(self) -> dict[str, Any]:
        """Everything that decides the documents, in plain JSON values; kept in `dataset.json`."""
        ...

    def total_documents(self) -> int | None:
        """For the progress bar; None where counting would cost a pass."""
        ...

    def documents(self) -> Iterator[tuple[str, str]]:
        """(split, text) of each document."""
        ...


def units_of(documents: Iterable[tuple[str, Any]], size: UnitSize) -> Iterator[Unit]:
    """Deal (split, document) out in order; at most one unit of each split is held."""
    waiting: dict[str, list[Any]] = {}
    characters: dict[str, int] = {}
    numbers: dict[str, int] = {}

    def take(split: str) -> Unit:
        numbers[split] = numbers.get(split, -1) + 1
        characters[split] = 0
        return Unit(split, numbers[split], waiting.pop(split))

    for split, document in documents:
        unit = waiting.setdefault(split, [])
        unit.append(document)
        if size.characters:
            characters[split] = characters.get(split, 0) + len(document)
        if len(unit) == size.documents or (size.characters and characters[split] >= size.characters):
            yield take(split)
    for split in sorted(waiting):
        yield take(split)


def content_hash(text: str) -> int:
    """64 bits that depend on the text alone, not on the spaces around it."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big")


class TextSource:
    """Any local text.

    A document is for validation if its content's hash is in the lowest share of all possible hashes, so equal
    documents are on one side. The document of the lowest hash always is, so that a small input has a validation
    split too. One pass over the input, before anything else, finds that hash and every damaged file.
    """

    # Not only by documents: a few books must still be shared out among many cores.
    unit_size = UnitSize(characters=1 << 21)
    detokenise = None

    def __init__(self, inputs: Sequence[str | Path], reading: Reading, validation_share: float) -> None:
        if not 0 < validation_share < 1:
            raise UserError(f"--validation-share {validation_share} is not between 0 and 1; 0.01 is usual")
        self._files = find_files(inputs)
        self._reading = reading
        self._validation_share = validation_share

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "text",
            "separation": self._reading.separation,
            "text_field": self._reading.field,
            "validation_share": self._validation_share,
            "input": fingerprint_files(self._files),
        }

    def total_documents(self) -> int:
        return self._survey[0]

    def documents(self) -> Iterator[tuple[str, str]]:
        highest = max(int(self._validation_share * 2**64), self._survey[1])
        for text in self._texts():
            yield VALIDATION if content_hash(text) <= highest else TRAIN, text

    @cached_property
    def _survey(self) -> tuple[int, int]:
        """Number of documents and the lowest content hash."""
        count, lowest, highest = 0, 2**64, -1
        for text in tracked(self._texts(), "surveying the input"):
            value = content_hash(text)
            count, lowest, highest = count + 1, min(lowest, value), max(highest, value)
        if highest <= max(lowest, int(self._validation_share * 2**64)):
            raise UserError(
                f"{self._files[0].path}: {count} different documents are too few for training and validation; "
                "give more text, or make more documents of it with --documents paragraph or line"
            )
        return count, lowest

    def _texts(self) -> Iterator[str]:
        for file in self._files:
            yield from (text for text in read_documents(file, self._reading) if text.strip())
