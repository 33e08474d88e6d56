"""Binary streams out of plain, .gz and .zst files, whose damage is noticed and told in one line."""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from pgm_scale.errors import UserError

_BLOCK_BYTES = 1 << 18
_PACKED_BYTES = 1 << 12  # four bytes of zstd may be 128 kB of zeros: this much is at most 128 MiB at a time


def check_plain(path: Path) -> None:
    """
    Raises:
        OSError: it is a FIFO, a device or a folder: reading the first would wait for ever, the second never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))


def open_binary(path: Path) -> IO[bytes]:
    """The content of a plain file, unpacked if its suffix says that it is packed."""
    check_plain(path)
    opener = COMPRESSIONS.get(path.suffix.lower())
    return opener(path) if opener else open(path, "rb")


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what a damaged or unreadable file raises into one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or cut off {path.suffix} data ({error}); copy it again") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({_one_line(error)}); check the path and permissions, or copy it again"
        ) from None


def _one_line(error: OSError) -> str:
    """pyarrow's have no `strerror` and several lines."""
    return error.strerror or " ".join(str(error).split())[:300]


class _ZstandardFile(io.RawIOBase):
    """Frames of a .zst file one after the other; unlike the library's reader it notices a cut-off end."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._pending = memoryview(b"")
        self._started = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            packed = self._frame.unused_data if self._frame.eof else b""
            packed = packed or self._file.read(_PACKED_BYTES)
            if not packed:
                if self._started and not self._frame.eof:
                    raise EOFError("the last frame is not complete")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._started = True
            self._pending = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


COMPRESSIONS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": lambda path: io.BufferedReader(gzip.GzipFile(path)),
    ".zst": lambda path: io.BufferedReader(_ZstandardFile(path), _BLOCK_BYTES),
}
