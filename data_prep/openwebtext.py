"""OpenWebText as published (FACTS 3.8): the last 100,000 documents are for validation, no detokeniser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from data_prep.progress import tracked
from data_prep.readers import InputFile, Reading, count_documents, fingerprint_files, read_documents
from data_prep.sources import TRAIN, VALIDATION, UnitSize
from pgm_scale.errors import UserError

HUB_REPOSITORY = "Skylion007/openwebtext"
VALIDATION_DOCUMENTS = 100_000


class OpenWebTextSource:
    unit_size = UnitSize()
    detokenise = None

    def __init__(
        self,
        files: Sequence[InputFile],
        reading: Reading,
        validation_documents: int = VALIDATION_DOCUMENTS,
        revision: str | None = None,
    ) -> None:
        """`revision` is the commit that the files come from, where they come from a hub."""
        self._files = files
        self._reading = reading
        self._validation_documents = validation_documents
        self._revision = revision

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "openwebtext",
            "revision": self._revision,
            "separation": self._reading.separation,
            "text_field": self._reading.field,
            "validation_documents": self._validation_documents,
            "input": fingerprint_files(self._files),
        }

    def total_documents(self) -> int:
        return self._total

    @cached_property
    def _total(self) -> int:
        files = tracked(self._files, "counting the documents of the files", len(self._files))
        total = sum(count_documents(file, self._reading) for file in files)
        if not 0 < self._validation_documents < total:
            raise UserError(
                f"{self._files[0].path}: {total} documents cannot give {self._validation_documents} "
                "for validation; give the whole data set, or set --validation-documents"
            )
        return total

    def documents(self) -> Iterator[tuple[str, str]]:
        training_documents = self._total - self._validation_documents
        texts = (text for file in self._files for text in read_documents(file, self._reading))
        for number, text in enumerate(texts):
            yield TRAIN if number < training_documents else VALIDATION, text
