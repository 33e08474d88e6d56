"""Files that are either whole or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_READ_BYTES = 1 << 20


def temporary_name(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, beside it, overwritten by the next attempt."""
    return path.with_name(f".{path.name}.writing")


def commit(temporary: Path, final: Path) -> None:
    """Sync a finished file to disk and move it to its final name, which it replaces."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that no reader ever sees a part of it."""
    temporary = temporary_name(path)
    temporary.write_bytes(content)
    commit(temporary, path)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
