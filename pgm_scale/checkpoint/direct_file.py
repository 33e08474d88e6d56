"""A new file, written from the start to the end without the page cache (O_DIRECT).

The disk reads the buffers themselves: no copy, a tenth of the processor's time, up to 1.5 times the rate, and the
cached training data stay in memory. The costs: buffers and lengths are aligned, and reading the file at once reads
the disk. A file system that knows no O_DIRECT gets plain writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from pgm_scale.checkpoint.host_buffers import Chunk

_BLOCK_BYTES = 4096  # a multiple of every usual disk's sector


class DirectFile:
    """`with DirectFile(path) as file`: one `write` a chunk, then `sync`. All raise OSError."""

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        try:
            self._descriptor = _create(path, os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = _create(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, chunk: Chunk) -> None:
        """Add a chunk; only the last one may be short. What it is rounded up by is cut off by `sync`."""
        assert self.size_bytes % _BLOCK_BYTES == 0, "a short chunk was not the last one"
        data = chunk.buffer.numpy().data[: -(-chunk.size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES]
        done_bytes = 0
        while done_bytes < len(data):
            done_bytes += self._write_some(data[done_bytes:], self.size_bytes + done_bytes)
        self.size_bytes += chunk.size_bytes

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        os.ftruncate(self._descriptor, self.size_bytes)
        os.fsync(self._descriptor)

    def _write_some(self, data: memoryview, offset_bytes: int) -> int:
        try:
            return os.pwrite(self._descriptor, data, offset_bytes)
        except OSError as error:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            return os.pwrite(self._descriptor, data, offset_bytes)


def _create(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o666)
