"""One rank's file on its way to the disk, in two ways that give the same bytes.

As fast as it goes while training waits: copied to the host, hashed and written at the same time. One after the
other in a single thread while training goes on: there only the processors' time counts, and every thread that wakes
up takes the interpreter's lock from the one that trains.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from pgm_scale.checkpoint.direct_file import DirectFile
from pgm_scale.checkpoint.fragments import FileEntry, Fragment, Kind, file_header
from pgm_scale.checkpoint.host_buffers import Chunk, HostBuffers, chunks_of

_CHUNKS_UNDER_WAY = 2  # and one that is being filled


def write_fragments(
    path: Path,
    fragments: Iterable[tuple[Kind, Fragment]],
    progress: Callable[[str], None] = lambda _: None,
    buffers: HostBuffers | None = None,
    copied: Callable[[], None] | None = None,
) -> FileEntry:
    """Write one rank's fragments and wait until they are on the disk.

    The hash is taken from the bytes on their way out, which saves reading the file again; at load it tells
    whether the disk holds what was meant.

    Args:
        progress: told after each chunk.
        buffers: to be used again by the next save.
        copied: for a write while training goes on: copy everything to the host first, and call this when the
            fragments' values may change again. Else the memory needed beside the values is three chunks.

    Raises:
        OSError: the disk is full, the folder is read-only, ...
    """
    owned = list(fragments)
    buffers = buffers or HostBuffers()
    header = torch.frombuffer(bytearray(file_header(owned)), dtype=torch.uint8)
    chunks = chunks_of([header, *(fragment.values.detach() for _, fragment in owned)], buffers)

    def done(chunk: Chunk) -> None:
        buffers.give_back(chunk.buffer)
        progress(f"writing {path.name}")

    if copied is None:
        return _write_fast(path, chunks, done)
    snapshot = []
    for chunk in chunks:
        snapshot.append(chunk)
        progress(f"copying for {path.name}")
    copied()
    return _write_quietly(path, snapshot, done)


def _write_quietly(path: Path, chunks: Iterable[Chunk], done: Callable[[Chunk], None]) -> FileEntry:
    """Each chunk is hashed and then written."""
    digest = hashlib.sha256()
    with DirectFile(path) as file:
        for chunk in chunks:
            digest.update(chunk.data)
            file.write(chunk)
            done(chunk)
        file.sync()
    return FileEntry(path.name, file.size_bytes, digest.hexdigest())


def _write_fast(path: Path, chunks: Iterable[Chunk], done: Callable[[Chunk], None]) -> FileEntry:
    """Hashing and writing release the GIL: each has a thread, while this one fills the next chunk."""
    digest = hashlib.sha256()
    under_way: deque[tuple[Chunk, Future[None], Future[None]]] = deque()

    def finish_oldest() -> None:
        chunk, hashed, written = under_way.popleft()
        hashed.result()
        written.result()
        done(chunk)

    with DirectFile(path) as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
        for chunk in chunks:
            hashed = hasher.submit(digest.update, chunk.data)
            under_way.append((chunk, hashed, writer.submit(file.write, chunk)))
            if len(under_way) == _CHUNKS_UNDER_WAY:
                finish_oldest()
        while under_way:
            finish_oldest()
        file.sync()
    return FileEntry(path.name, file.size_bytes, digest.hexdigest())
