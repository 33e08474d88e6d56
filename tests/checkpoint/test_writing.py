"""The fast path of a rank's file, against the obvious one: chunks on the host, O_DIRECT, the plain fall-back."""

import errno
import hashlib
import os

import pytest
import torch

from pgm_scale.checkpoint import direct_file, host_buffers
from pgm_scale.checkpoint.direct_file import DirectFile
from pgm_scale.checkpoint.fragments import Fragment, Kind, file_header
from pgm_scale.checkpoint.host_buffers import HostBuffers, chunks_of
from pgm_scale.checkpoint.writing import write_fragments
from pgm_scale.tensor_slices import TensorSlice

CHUNK_BYTES = 3 * 4096


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(host_buffers, "CHUNK_BYTES", CHUNK_BYTES)


def fragments(*lengths: int) -> list[tuple[Kind, Fragment]]:
    return [
        ("ema", Fragment(f"p{i}", TensorSlice.whole((n,)), 0, torch.randn(2 * n)[::2]))
        for i, n in enumerate(lengths)
    ]


def plain_bytes(owned: list[tuple[Kind, Fragment]]) -> bytes:
    """What the file must be."""
    return file_header(owned) + b"".join(fragment.values.numpy().tobytes() for _, fragment in owned)


def header_bytes(*lengths: int) -> int:
    return len(file_header(fragments(*lengths)))


@pytest.mark.parametrize("copies_first", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [(), (0,), (1,), (CHUNK_BYTES // 4,), (5, 0, 20_000, 1, 7), (40_000, 40_000, 3)]
    # Files that end with a block, with a chunk, and one element before and after.
    + [((CHUNK_BYTES - header_bytes(1000)) // 4 + extra,) for extra in (-1025, -1024, -1, 0, 1)],
)
def test_the_file_is_what_the_plain_way_writes(tmp_path, lengths, copies_first):
    owned, calls = fragments(*lengths), []
    entry = write_fragments(
        tmp_path / "rank", owned, copied=(lambda: calls.append("copied")) if copies_first else None
    )
    expected = plain_bytes(owned)
    assert (tmp_path / "rank").read_bytes() == expected
    assert (entry.bytes, entry.sha256) == (len(expected), hashlib.sha256(expected).hexdigest())
    assert calls == ["copied"] * copies_first


def test_buffers_start_on_pages_and_are_used_again(tmp_path):
    owned, buffers = fragments(10_000, 20_000), HostBuffers()
    write_fragments(tmp_path / "rank", owned, buffers=buffers)
    streamed = {buffer.data_ptr() for buffer in buffers._free}
    assert 1 <= len(streamed) <= 3, "a save that streams holds three at most"
    chunks = list(chunks_of([f.values for _, f in owned], buffers))
    addresses = {chunk.buffer.data_ptr() for chunk in chunks}
    assert len(addresses) == len(chunks) == -(-120_000 // CHUNK_BYTES)
    assert addresses >= streamed
    assert all(address % 4096 == 0 for address in addresses)
    for chunk in chunks:
        buffers.give_back(chunk.buffer)
    for _ in range(2):
        write_fragments(tmp_path / "rank", owned, buffers=buffers, copied=lambda: None)
    assert {buffer.data_ptr() for buffer in buffers._free} == addresses


def _refuse_to_open(monkeypatch):
    real_open = os.open

    def refusing(path, flags, *arguments, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return real_open(path, flags, *arguments, **options)

    monkeypatch.setattr(direct_file.os, "open", refusing)


def _refuse_to_write(monkeypatch):
    real_write, fcntl = os.pwrite, direct_file.fcntl

    def refusing(descriptor, *arguments):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, *arguments)

    monkeypatch.setattr(direct_file.os, "pwrite", refusing)


def _write_a_block_a_time(monkeypatch):
    real_write = os.pwrite
    monkeypatch.setattr(direct_file.os, "pwrite", lambda fd, data, place: real_write(fd, data[:4096], place))


@pytest.mark.parametrize("disturb", [_refuse_to_open, _refuse_to_write, _write_a_block_a_time])
def test_what_file_systems_may_do(tmp_path, monkeypatch, disturb):
    owned = fragments(5, 20_000, 7)
    disturb(monkeypatch)
    write_fragments(tmp_path / "rank", owned)
    assert (tmp_path / "rank").read_bytes() == plain_bytes(owned)


def test_an_error_of_the_disk_is_not_taken_for_a_missing_feature(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_file.os, "pwrite", fail)
    with pytest.raises(OSError, match="No space left"):
        write_fragments(tmp_path / "rank", fragments(20_000))
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "missing" / "rank")
