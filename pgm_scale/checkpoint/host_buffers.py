"""Buffers on the host through which the bytes of a checkpoint file go out, allocated once and used again.

The first touch of memory costs several times what a copy into it does, and pinning it still more. A chunk starts
on a page, so that a file can be written from it without the page cache (`direct_file`).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

CHUNK_BYTES = 16 << 20  # a power of two, to which torch would round pinned memory up anyway


@dataclass(frozen=True)
class Chunk:
    """The next `size_bytes` of a file, at the start of a whole buffer `[CHUNK_BYTES]` of uint8."""

    buffer: torch.Tensor
    size_bytes: int

    @property
    def data(self) -> memoryview:
        """Without what is left in the buffer of earlier chunks."""
        return self.buffer[: self.size_bytes].numpy().data


class HostBuffers:
    """Buffers that are lent and given back, from any thread; it keeps as many as were ever out at once."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        """One of `[CHUNK_BYTES]` uint8 that starts on a page; pinned where this process uses a GPU.

        Raises:
            OSError: there is no memory for another.
        """
        if self._free:
            return self._free.pop()
        try:
            if torch.cuda.is_initialized():
                return torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
            return torch.frombuffer(mmap.mmap(-1, CHUNK_BYTES), dtype=torch.uint8)
        except (MemoryError, RuntimeError) as error:
            raise OSError(
                f"no host memory for a copy of the state ({error}); set checkpoint.asynchronous=false"
            ) from error

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)


def chunks_of(parts: Iterable[torch.Tensor], buffers: HostBuffers) -> Iterator[Chunk]:
    """Copy tensors end to end into chunks, all of them full but the last.

    Args:
        parts: 1-D, on any device; each must begin at a multiple of its element size.
        buffers: a chunk's buffer is the caller's, to be given back.
    """
    buffer, filled_bytes, is_on_gpu = None, 0, False
    for part in parts:
        done, size = 0, part.element_size()
        is_on_gpu |= part.is_cuda
        while done < len(part):
            buffer = buffers.take() if buffer is None else buffer
            count = min(len(part) - done, (CHUNK_BYTES - filled_bytes) // size)
            target = buffer[filled_bytes : filled_bytes + count * size].view(part.dtype)
            _copy(target, part[done : done + count])
            done, filled_bytes = done + count, filled_bytes + count * size
            if filled_bytes == CHUNK_BYTES:
                yield _copied(buffer, filled_bytes, is_on_gpu)
                buffer, filled_bytes, is_on_gpu = None, 0, part.is_cuda
    if buffer is not None:
        yield _copied(buffer, filled_bytes, is_on_gpu)


def _copy(target: torch.Tensor, values: torch.Tensor) -> None:
    if values.is_cuda:
        target.copy_(values, non_blocking=True)
    else:
        np.copyto(target.numpy(), values.numpy())  # torch would take the threads that training computes with


def _copied(buffer: torch.Tensor, size_bytes: int, is_on_gpu: bool) -> Chunk:
    if is_on_gpu:
        torch.cuda.current_stream().synchronize()
    return Chunk(buffer, size_bytes)
