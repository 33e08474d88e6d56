"""Token rows to a shard file, byte for byte the same for the same rows, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pgm_scale.data.batch import ShardRows
from pgm_scale.data.manifest import Shard, ShardFormat
from pgm_scale.data.mds import write_mds, write_mds_index
from pgm_scale.data.tar import write_tar
from pgm_scale.files import sha256_file

__all__ = ["shard_name", "write_mds_index", "write_shard"]


def shard_name(number: int, format: ShardFormat) -> str:
    """The file name of shard `number` of a split, e.g. `shard-00007.mds`."""
    return f"shard-{number:05d}.{format}"


def write_shard(
    folder: str | Path,
    name: str,
    format: ShardFormat,
    tokens_RL: np.ndarray,
    valid_lengths_R: np.ndarray,
    labels_R: np.ndarray | None = None,
) -> Shard:
    """Write one shard and return its entry of the manifest.

    Until it is whole the shard lies in `.<name>.writing` (a file or a folder), which the next attempt at the
    same shard replaces.

    Args:
        tokens_RL: uint8, uint16 or uint32 [rows, length], at least one row.
        valid_lengths_R: integers [rows], 1 to length: how many leading tokens of a row are not padding.
        labels_R: integers [rows] from 0 on, the classes of images.
    """
    rows, length_tokens = tokens_RL.shape
    assert tokens_RL.dtype in (np.uint8, np.uint16, np.uint32), tokens_RL.dtype
    assert rows > 0
    assert valid_lengths_R.shape == (rows,)
    assert valid_lengths_R.min() >= 1
    assert valid_lengths_R.max() <= length_tokens
    path = Path(folder) / name
    if labels_R is not None:
        assert labels_R.shape == (rows,)
        assert labels_R.min() >= 0
        labels_R = labels_R.astype(np.uint32)
    write = write_mds if format == "mds" else write_tar
    write(path, ShardRows(tokens_RL, valid_lengths_R.astype(np.uint32), labels_R))
    return Shard(name=name, rows=rows, bytes=path.stat().st_size, sha256=sha256_file(path))
