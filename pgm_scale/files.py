"""Files that survive a crash: written whole or not at all, and known by their SHA-256."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from pathlib import Path
from typing import Any

from pgm_scale.errors import UserError


def _is_special(path: Path) -> bool:
    """A folder, a device or a pipe, whose name a written file would take; root may do so to /dev/null."""
    return (os.path.exists(path) and not path.is_file()) or path.absolute().parent == Path("/dev")


def check_writable(option: str, path: str | Path) -> None:
    """Refuse, before long work, a file that could not be written in the end.

    Raises:
        UserError: names the option.
    """
    if _is_special(Path(path)) or not os.access(Path(path).absolute().parent, os.W_OK):
        raise UserError(f"{option} {path}: give a file in a folder that can be written")


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a file or a rename is safe only after its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` and wait until it is on the disk. Its name is durable after `fsync_folder`."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def temporary_name(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, beside it, overwritten by the next attempt."""
    return path.with_name(f".{path.name}.writing")


def commit(temporary: Path, final: Path) -> None:
    """Sync a finished file to disk and move it to its final name, which it replaces."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    fsync_folder(final.parent)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` so that every reader, and every crash, sees the old bytes or the new, never a mix.

    One writer a path: the temporary name is fixed, so a dead writer leaves at most one.
    """
    if _is_special(path):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    temporary = temporary_name(path)
    write_synced(temporary, data)
    os.replace(temporary, path)
    fsync_folder(path.parent)


def read_bounded(path: str | Path, most_bytes: int = 1 << 28) -> bytes:
    """The bytes of a file that a user names; no device fills the memory, no pipe without a writer is waited for.

    Raises:
        OSError: it cannot be read, or has more bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with open(descriptor, "rb") as file:
        os.set_blocking(descriptor, True)
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes:,} bytes", str(path))
    return content


def check_regular(path: str | Path) -> None:
    """For those who let a library open it, which would wait for the writer of a pipe.

    Raises:
        OSError: it is absent, or no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces, as lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """Containers with None in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
