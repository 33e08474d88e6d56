"""Documents out of local .txt, .jsonl and .parquet files, each plain, .gz or .zst, streamed.

Whatever is wrong with a file is a `UserError` that names the file, the line or row, and what to do. Memory is
bounded by one line of .jsonl, one row group of .parquet, and a constant for .txt.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.compression import COMPRESSIONS, check_plain, open_binary, reported
from data_prep.progress import tracked
from pgm_scale.errors import UserError
from pgm_scale.files import sha256_file

Separation = Literal["file", "paragraph", "line"]
TEXT_KINDS = (".txt", ".jsonl", ".parquet")

LONGEST_TXT_CHARACTERS = 65_536
_BLOCK_BYTES = 1 << 18
_LONGEST_JSON_BYTES = 1 << 28
_PARQUET_BATCH_ROWS = 256
_HASHED_AT_A_TIME = 4096
_HASHING_THREADS = 4  # hashlib releases the interpreter lock
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True)
class Reading:
    """How files become documents: `separation` is for .txt, `field` names the key or column of the others."""

    separation: Separation = "file"
    field: str = "text"


@dataclass(frozen=True)
class InputFile:
    """`name` is the path below the input it was found in, which is what a dataset remembers of it."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """`.txt`, `.jsonl` or `.parquet`, whatever compression follows; another suffix as it is."""
        name = self.path.name.lower().removesuffix(".gz").removesuffix(".zst")
        return Path(name).suffix


def find_files(
    inputs: Sequence[str | Path],
    kinds: Collection[str] = TEXT_KINDS,
    named: str = ".txt, .jsonl or .parquet",
) -> list[InputFile]:
    """The files to read, in order: inputs as given, folders walked in sorted order, hidden entries left out.

    Args:
        kinds: the `InputFile.kind`s to look for.
        named: the same in the words of an error.

    Raises:
        UserError: an input that is absent, a file of an unknown kind, or no file at all.
    """
    files = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            found = [InputFile(path, path.relative_to(entry).as_posix()) for path in _walk(entry)]
            files += sorted((f for f in found if f.kind in kinds), key=lambda f: f.name.split("/"))
        elif entry.is_file():
            files.append(InputFile(entry, entry.name))
        else:
            what = "not a plain file or a folder" if entry.exists() else "no such file or folder"
            raise UserError(f"{entry}: {what}; give {named} files or folders")
    unknown = [str(file.path) for file in files if file.kind not in kinds]
    if unknown:
        raise UserError(f"{unknown[0]}: unknown kind of file; give {named}, plain, .gz or .zst")
    if not files:
        raise UserError(f"no {named} file (plain, .gz or .zst) in {', '.join(map(str, inputs))}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: cannot read the folder ({error.strerror}); change its permissions"
        )

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def fingerprint_files(files: Sequence[InputFile], may_be_unreadable: bool = False) -> dict[str, Any]:
    """Count, total size and one SHA-256 over the names and contents of `files`, in order.

    Raises:
        UserError: a file cannot be read, unless that `may_be`: then it is one of 0 bytes that says so.
    """

    def line(file: InputFile) -> tuple[str, int]:
        try:
            with reported(file.path):
                check_plain(file.path)
                content, size_bytes = sha256_file(file.path), file.path.stat().st_size
        except UserError:
            if not may_be_unreadable:
                raise
            content, size_bytes = "unreadable", 0
        return f"{content} {size_bytes} {file.name}\n", size_bytes

    def lines() -> Iterator[tuple[str, int]]:
        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            for start in range(
                0, len(files), _HASHED_AT_A_TIME
            ):  # a million images are a million small files
                yield from threads.map(line, files[start : start + _HASHED_AT_A_TIME])

    digest = hashlib.sha256()
    total_bytes = 0
    for text, size_bytes in tracked(lines(), "checking the input files", len(files)):
        digest.update(text.encode("utf-8", "surrogateescape"))
        total_bytes += size_bytes
    return {"files": len(files), "bytes": total_bytes, "sha256": digest.hexdigest()}


def read_documents(file: InputFile, reading: Reading) -> Iterator[str]:
    """The documents of one file, in order. `UserError` as said at the top of this module."""
    return _READERS[file.kind](file.path, reading)


def count_documents(file: InputFile, reading: Reading) -> int:
    """How many documents `read_documents` gives; a plain .parquet answers without being read."""
    if file.path.suffix.lower() == ".parquet":
        with open_parquet(file.path) as parquet:
            return parquet.metadata.num_rows
    return sum(1 for _ in read_documents(file, reading))


def cut_long(text: str) -> tuple[list[str], str]:
    """Cut `text` until the rest has at most `LONGEST_TXT_CHARACTERS`; return the pieces and the rest.

    A cut is made after the last newline in the second half of what is allowed, else before the last space in
    it (where the pre-tokenizers of GPT-2 and BERT cut too, so that no token changes), else where it must be.
    """
    pieces, start = [], 0
    while len(text) - start > LONGEST_TXT_CHARACTERS:
        end, middle = start + LONGEST_TXT_CHARACTERS, start + LONGEST_TXT_CHARACTERS // 2
        newline, space = text.rfind("\n", middle, end) + 1, text.rfind(" ", middle, end)
        cut = newline or (space if space > 0 else end)
        pieces.append(text[start:cut])
        start = cut
    return pieces, text[start:]


def _read_txt(path: Path, reading: Reading) -> Iterator[str]:
    """Documents that are not blank; one longer than `LONGEST_TXT_CHARACTERS` becomes several."""
    rest = ""
    for block in _text_blocks(path):
        *documents, rest = _separate(rest + block, reading.separation)
        for document in documents:
            pieces, last = cut_long(document)
            yield from (piece for piece in (*pieces, last) if piece.strip())
        pieces, rest = cut_long(rest)
        yield from (piece for piece in pieces if piece.strip())
    if rest.strip():
        yield rest


def _separate(text: str, separation: Separation) -> list[str]:
    if separation == "paragraph":
        return _BLANK_LINES.split(text)
    return text.split("\n") if separation == "line" else [text]


def _text_blocks(path: Path) -> Iterator[str]:
    """Decoded blocks of fixed size, every kind of line end as a newline, without a byte order mark."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    newlines = 0
    with reported(path), open_binary(path) as stream:
        while True:
            block = stream.read(_BLOCK_BYTES)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = 1 + newlines + error.object[: error.start].count(b"\n")
                raise _not_utf8(path, f"line {line}") from None
            if text:
                yield text
            if not block:
                return
            newlines += block.count(b"\n")


def _read_jsonl(path: Path, reading: Reading) -> Iterator[str]:
    number = 0
    with reported(path), open_binary(path) as stream:
        while line := stream.readline(_LONGEST_JSON_BYTES + 1):
            number += 1
            if len(line) > _LONGEST_JSON_BYTES:
                raise UserError(
                    f"{path}, line {number}: longer than {_LONGEST_JSON_BYTES} bytes; split it up"
                )
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _json_text(line, reading.field, path, number)


def _json_text(line: bytes, field: str, path: Path, number: int) -> str:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _not_utf8(path, f"line {number}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); repair or delete the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with the key {field!r}; each line must be one")
    text = row.get(field)
    if not isinstance(text, str):
        found = (
            f"{type(text).__name__} under it"
            if field in row
            else f"keys {', '.join(map(repr, row)) or 'none'}"
        )
        raise UserError(
            f"{where}: no text under the key {field!r} (found {found}); name it with --text-field"
        )
    if b"\\u" in line and not _is_encodable(text):
        raise UserError(f"{where}: half of a surrogate pair in {field!r}, which no text has; repair the line")
    return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, reading: Reading) -> Iterator[str]:
    with open_parquet(path) as parquet:
        schema = parquet.schema_arrow
        if reading.field not in schema.names:
            found = ", ".join(map(repr, schema.names))
            raise UserError(f"{path}: no column {reading.field!r} (found {found}); name it with --text-field")
        if str(schema.field(reading.field).type) not in ("string", "large_string"):
            kind = schema.field(reading.field).type
            raise UserError(f"{path}: column {reading.field!r} is {kind}, not string; name another one")
        row = 0
        for batch in parquet.iter_batches(_PARQUET_BATCH_ROWS, columns=[reading.field]):
            for value in batch.column(0):
                row += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    raise _not_utf8(path, f"row {row}") from None
                if text is None:
                    raise UserError(f"{path}, row {row}: null in {reading.field!r}; drop or fill such rows")
                yield text


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; whatever is wrong with the file is a `UserError`, also while it is read."""
    import pyarrow
    import pyarrow.parquet

    with reported(path), open_binary(path) as stream:
        if path.suffix.lower() in COMPRESSIONS:  # parquet is read from its end, which a stream does not have
            unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        try:
            with stream, pyarrow.parquet.ParquetFile(stream) as parquet:
                yield parquet
        except pyarrow.ArrowException as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a readable parquet file ({reason}); copy it again") from None


def _not_utf8(path: Path, where: str) -> UserError:
    return UserError(f"{path}, {where}: not UTF-8 text; convert the file, for example with iconv -t UTF-8")


_READERS: dict[str, Callable[[Path, Reading], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
