"""MDS by mosaicml-streaming itself: the slow, obvious reader and writer that `pgm_scale.data.mds` must equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pgm_scale.data.batch import ShardRows
from pgm_scale.data.manifest import DatasetManifest, Shard


def write_mds(path: Path, rows: ShardRows) -> None:
    """The writer names its file itself, so it is given a folder beside `path`."""
    from streaming import MDSWriter

    folder = path.with_name(f"{path.name}.folder")
    tokens_RL = rows.tokens_RL
    columns = {"tokens": f"ndarray:{tokens_RL.dtype.name}:{tokens_RL.shape[1]}", "valid_length": "uint32"}
    if rows.labels_R is not None:
        columns["label"] = "uint32"
    with MDSWriter(columns=columns, out=str(folder), size_limit=None) as writer:
        for row in range(len(tokens_RL)):
            sample = {"tokens": tokens_RL[row], "valid_length": rows.valid_lengths_R[row]}
            writer.write(sample | ({} if rows.labels_R is None else {"label": rows.labels_R[row]}))
    (folder / "shard.00000.mds").rename(path)


def read_mds(path: Path, shard: Shard, manifest: DatasetManifest) -> ShardRows:
    """Row by row."""
    from streaming.base.format.mds.reader import MDSReader

    itemsize = np.dtype(manifest.token_dtype).itemsize
    labels = [("label", "uint32", 4)] if manifest.images is not None else []
    tokens = (
        "tokens",
        f"ndarray:{manifest.token_dtype}:{manifest.length_tokens}",
        manifest.length_tokens * itemsize,
    )
    names, encodings, sizes = zip(*labels, tokens, ("valid_length", "uint32", 4), strict=True)
    reader = MDSReader(
        dirname=str(path.parent),
        split=None,
        column_encodings=list(encodings),
        column_names=list(names),
        column_sizes=list(sizes),
        compression=None,
        hashes=[],
        raw_data=_file_info(path),
        samples=shard.rows,
        size_limit=None,
        zip_data=None,
    )
    samples = [reader.get_item(row) for row in range(shard.rows)]
    return ShardRows(
        np.stack([s["tokens"] for s in samples]),
        np.array([s["valid_length"] for s in samples]),
        np.array([s["label"] for s in samples]) if labels else None,
    )


def _file_info(path: Path):
    from streaming.base.format.base.reader import FileInfo

    return FileInfo(path.name, path.stat().st_size, {})
