"""Samples to files: readable text, JSON lines, or a token array."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes

OutputFormat = Literal["text", "jsonl", "npy"]
_FORMAT_OF_SUFFIX: dict[str, OutputFormat] = {".txt": "text", ".jsonl": "jsonl", ".npy": "npy"}


def chosen_format(given: OutputFormat | None, path: str | Path | None) -> OutputFormat:
    """What was asked for, else what the suffix of the file says, else text.

    Raises:
        UserError: the two differ.
    """
    by_suffix = None if path is None else _FORMAT_OF_SUFFIX.get(Path(path).suffix.lower())
    if given is not None and by_suffix not in (None, given):
        raise UserError(f"--out {path} is no file of --format {given}; leave one of them out")
    return given or by_suffix or "text"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizers` JSON.

    Raises:
        UserError: it is missing or no tokenizer.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"cannot read the tokenizer {path}: {error}; give a tokenizers JSON file") from None


def to_text(tokens_BL: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """One string a row; special tokens stay visible, because they are where documents begin and end."""
    return tokenizer.decode_batch(tokens_BL.tolist(), skip_special_tokens=False)


def render_samples(
    tokens_BL: np.ndarray,
    output_format: OutputFormat,
    tokenizer: Tokenizer | None = None,
    first_sample_number: int = 0,
) -> bytes:
    """Samples as the bytes of a file.

    Formats: `text` puts a numbered heading before each sample; `jsonl` has one object a line with
    `sample_number`, `text` (null without a tokenizer) and `tokens`; `npy` is int32 [B, L].

    Raises:
        UserError: `text` without a tokenizer.
    """
    if output_format == "npy":
        array_file = io.BytesIO()
        np.save(array_file, tokens_BL.astype(np.int32))
        return array_file.getvalue()
    if output_format == "text" and tokenizer is None:
        raise UserError("cannot write text without a tokenizer; choose jsonl or npy")
    texts = [None] * len(tokens_BL) if tokenizer is None else to_text(tokens_BL, tokenizer)
    numbered = list(zip(range(first_sample_number, first_sample_number + len(tokens_BL)), texts, strict=True))
    if output_format == "text":
        return "".join(f"=== sample {number} ===\n{text}\n\n" for number, text in numbered).encode()
    rows = [
        {"sample_number": number, "text": text, "tokens": tokens_L}
        for (number, text), tokens_L in zip(numbered, tokens_BL.tolist(), strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_samples(
    path: str | Path,
    tokens_BL: np.ndarray,
    output_format: OutputFormat,
    tokenizer: Tokenizer | None = None,
    first_sample_number: int = 0,
) -> None:
    """Write `render_samples` so that the file is either whole or not there.

    Raises:
        UserError: `text` without a tokenizer, or the file cannot be written.
    """
    content = render_samples(tokens_BL, output_format, tokenizer, first_sample_number)
    try:
        atomic_write_bytes(Path(path), content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from None
