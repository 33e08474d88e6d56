"""Texts to token rows: what `data_prep.pipeline` has to know of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data_prep.packing import Packing
from data_prep.pipeline import Counts, OutputOptions, RowFormat, check_shard_size, prepare_job
from data_prep.sources import SPLITS, TRAIN, DocumentSource, units_of
from data_prep.text_encoding import TextEncoding
from data_prep.tokenizers import load_tokenizer, open_tokenizer, size_to_train, train_bpe, vocabulary_of
from data_prep.units import Unit
from pgm_scale.data.manifest import TOKENIZER_NAME, DatasetManifest, Vocabulary, token_dtype_for
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes

_TRAINED_NAME = "tokenizer.sha256"  # in the work folder, of a tokenizer that was trained


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(OutputOptions):
    """`tokenizer` is a path, a hub name or `train:bpe:<size>`."""

    tokenizer: str
    length_tokens: int
    packing: Packing = "wrap"

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.length_tokens < 4:
            problems.insert(0, f"--length {self.length_tokens} is below 4 (BOS, EOS and text)")
        return problems


def prepare(source: DocumentSource, options: PrepareOptions) -> list[DatasetManifest]:
    """`prepare_job` of the source's texts.

    Raises:
        UserError: also bad options, all at once.
    """
    problems = options.problems()
    if problems:
        raise UserError("; ".join(problems))
    # The tokenizer, which may still have to be trained, decides between 2 bytes a token and these 4.
    check_shard_size(options, options.length_tokens, "uint32", labelled=False)
    return prepare_job(TextJob(source, options), options)


class TextJob:
    activity = "tokenizing"
    tokenizer_files = (TOKENIZER_NAME,)

    def __init__(self, source: DocumentSource, options: PrepareOptions) -> None:
        self._source = source
        self._options = options
        self._size_to_train = size_to_train(options.tokenizer)

    def plan(self) -> dict[str, Any]:
        options, loaded = self._options, self._loaded_tokenizer
        return {
            "tokenizer": options.tokenizer if loaded is None else hashlib.sha256(loaded).hexdigest(),
            "length_tokens": options.length_tokens,
            "packing": options.packing,
            "unit": asdict(self._source.unit_size),
            "text": self._source.describe(),
        }

    def make_tokenizer(self, folder: Path, progress: Progress) -> None:
        if self._loaded_tokenizer is not None:
            atomic_write_bytes(folder / TOKENIZER_NAME, self._loaded_tokenizer)
        elif not _is_as_trained(folder):
            content = self._train_tokenizer(self._size_to_train or 0, progress)
            atomic_write_bytes(folder / TOKENIZER_NAME, content)
            atomic_write_bytes(folder / _TRAINED_NAME, hashlib.sha256(content).hexdigest().encode())

    def encoding(self, folder: Path) -> TextEncoding:
        options = self._options
        return TextEncoding(
            folder / TOKENIZER_NAME,
            self._vocabulary(folder),
            options.packing,
            options.length_tokens,
            self._source.detokenise,
        )

    def total_documents(self) -> int | None:
        return self._source.total_documents()

    def units(self) -> Iterator[Unit]:
        return units_of(self._source.documents(), self._source.unit_size)

    def check(self, counts: Counts) -> None:
        for split in SPLITS:
            if not any(unit.rows for unit in counts[split]):
                documents = sum(unit.documents for unit in counts[split])
                raise UserError(
                    f"the {split} split has {documents} documents, too few for one row of "
                    f"{self._options.length_tokens} tokens; give more text, a shorter --length, or another share "
                    "for validation"
                )

    def row_format(self, folder: Path) -> RowFormat:
        vocabulary = self._vocabulary(folder)
        options = self._options
        return RowFormat(vocabulary, options.length_tokens, token_dtype_for(vocabulary.size), options.packing)

    @cached_property
    def _loaded_tokenizer(self) -> bytes | None:
        """None for one that is to be trained."""
        return load_tokenizer(self._options.tokenizer) if self._size_to_train is None else None

    def _train_tokenizer(self, size: int, progress: Progress) -> bytes:
        task = progress.add_task("training the tokenizer", total=None)
        detokenise = self._source.detokenise
        texts = (
            detokenise(text) if detokenise else text
            for split, text in self._source.documents()
            if split == TRAIN
        )
        content = train_bpe(texts, size)
        progress.update(task, total=1, completed=1)
        return content

    def _vocabulary(self, folder: Path) -> Vocabulary:
        options = self._options
        tokenizer = open_tokenizer((folder / TOKENIZER_NAME).read_bytes(), options.tokenizer)
        return vocabulary_of(tokenizer, options.packing, options.tokenizer)


def _is_as_trained(folder: Path) -> bool:
    """Whether an earlier run trained the tokenizer and nothing has damaged it since."""
    try:
        content, written = (folder / TOKENIZER_NAME).read_bytes(), (folder / _TRAINED_NAME).read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content).hexdigest().encode() == written
