"""MDS by mosaicml-streaming itself: the slow, obvious reader and writer that `pgm_scale.data.mds` must equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pgm_scale.data.manifest import DatasetManifest, Shard


def write_mds(path: Path, tokens_RL: np.ndarray, valid_lengths_R: np.ndarray) -> None:
    """The writer names its file itself, so it is given a folder beside `path`."""
    from streaming import MDSWriter

    folder = path.with_name(f"{path.name}.folder")
    columns = {"tokens": f"ndarray:{tokens_RL.dtype.name}:{tokens_RL.shape[1]}", "valid_length": "uint32"}
    with MDSWriter(columns=columns, out=str(folder), size_limit=None) as writer:
        for tokens_L, valid_length in zip(tokens_RL, valid_lengths_R, strict=True):
            writer.write({"tokens": tokens_L, "valid_length": valid_length})
    (folder / "shard.00000.mds").rename(path)


def read_mds(path: Path, shard: Shard, manifest: DatasetManifest) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, length] and valid lengths [rows], row by row."""
    from streaming.base.format.mds.reader import MDSReader

    itemsize = np.dtype(manifest.token_dtype).itemsize
    reader = MDSReader(
        dirname=str(path.parent),
        split=None,
        column_encodings=[f"ndarray:{manifest.token_dtype}:{manifest.length_tokens}", "uint32"],
        column_names=["tokens", "valid_length"],
        column_sizes=[manifest.length_tokens * itemsize, 4],
        compression=None,
        hashes=[],
        raw_data=_file_info(path),
        samples=shard.rows,
        size_limit=None,
        zip_data=None,
    )
    samples = [reader.get_item(row) for row in range(shard.rows)]
    return np.stack([s["tokens"] for s in samples]), np.array([s["valid_length"] for s in samples])


def _file_info(path: Path):
    from streaming.base.format.base.reader import FileInfo

    return FileInfo(path.name, path.stat().st_size, {})
