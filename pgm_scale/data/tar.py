"""WebDataset tar shards, written by tarfile and decoded by webdataset.

A sample is a chunk of at most 256 rows: `<chunk>.tokens.npy` [rows, length], `<chunk>.valid_lengths.npy` [rows]
and, of images, `<chunk>.labels.npy` [rows]. One row a sample would cost about 2 kB of tar and npy headers a row,
and 0.2 ms to read it.
`WebDataset(url).decode().to_tuple("tokens.npy", "valid_lengths.npy").unbatched()` yields the rows one by one.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from pgm_scale.data.batch import ShardRows
from pgm_scale.data.manifest import DatasetManifest, Shard
from pgm_scale.files import commit, temporary_name

CHUNK_ROWS = 256
_MEMBERS = ("tokens.npy", "valid_lengths.npy", "labels.npy")  # of a chunk, as the fields of `ShardRows`


def write_tar(path: Path, rows: ShardRows) -> None:
    """Write the rows to `path`."""
    temporary = temporary_name(path)
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for chunk, start in enumerate(range(0, len(rows.tokens_RL), CHUNK_ROWS)):
            for member, array in zip(_MEMBERS, rows, strict=True):
                if array is not None:
                    _add_array(archive, f"{chunk:06d}.{member}", array[start : start + CHUNK_ROWS])
    commit(temporary, path)


def _add_array(archive: tarfile.TarFile, name: str, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    member = tarfile.TarInfo(name)  # owner, group and time stay 0: the bytes depend on the rows alone
    member.size = content.tell()
    content.seek(0)
    archive.addfile(member, content)


def read_tar(path: Path, shard: Shard, manifest: DatasetManifest) -> ShardRows:
    """Decode a shard to rows.

    Only the members of each chunk, in order, are accepted, so a link, a device, a path that leaves the
    folder or a second copy of a name is refused; nothing is ever extracted to disk.

    Raises:
        ValueError, tarfile.TarError: the file does not hold exactly those members.
    """
    from webdataset.autodecode import (
        npy_loads,
    )  # refuses pickled arrays, unlike webdataset's decode() of .pyd
    from webdataset.tariterators import group_by_keys, tar_file_expander

    members = _MEMBERS if manifest.images is not None else _MEMBERS[:2]
    _check_members(path, _expected_members(shard.rows, manifest, members))
    with open(path, "rb") as stream:
        files = tar_file_expander([{"url": str(path), "stream": stream}])
        chunks = [[npy_loads(sample[member]) for member in members] for sample in group_by_keys(files)]
    return ShardRows(*(np.concatenate(arrays) for arrays in zip(*chunks, strict=True)))


_Expected = tuple[str, tuple[int, ...]]  # a member's name and the shape of its array


def _expected_members(rows: int, manifest: DatasetManifest, members: tuple[str, ...]) -> list[_Expected]:
    expected: list[_Expected] = []
    for chunk, start in enumerate(range(0, rows, CHUNK_ROWS)):
        count = min(CHUNK_ROWS, rows - start)
        for member in members:
            shape = (count, manifest.length_tokens) if member == "tokens.npy" else (count,)
            expected.append((f"{chunk:06d}.{member}", shape))
    return expected


def _check_members(path: Path, expected: list[_Expected]) -> None:
    """The archive's members must be exactly the expected ones, in their order, with arrays of these shapes.

    numpy would otherwise allocate whatever shape a header claims.
    """
    found = 0
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if not member.isreg():
                raise ValueError(f"its member {member.name!r} is not a plain file")
            if found >= len(expected) or member.name != expected[found][0]:
                raise ValueError(f"its member {found} is {member.name!r}, which no token shard has there")
            content = archive.extractfile(member)
            assert content is not None
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError(f"its member {member.name!r} is of another version of npy")
            shape, _, dtype = np.lib.format.read_array_header_1_0(content)
            if shape != expected[found][1] or dtype.hasobject:
                raise ValueError(
                    f"its member {member.name!r} is {dtype}{list(shape)}, not {list(expected[found][1])}"
                )
            found += 1
    if found < len(expected):
        raise ValueError(f"it ends after {found} of {len(expected)} members")
