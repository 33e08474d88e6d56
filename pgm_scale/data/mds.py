"""MDS shards, written and decoded by mosaicml-streaming.

Columns: `tokens` (`ndarray:<dtype>:<length>`) and `valid_length` (`uint32`), both of fixed size. The column
types come from our manifest, never from the file, so the format's pickle encoding cannot be reached.
`import streaming` takes some 5 s of CPU; a preparation that forks workers does well to import it first.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pgm_scale.data.manifest import DatasetManifest, Shard
from pgm_scale.files import atomic_write_bytes, commit, temporary_name

INDEX_NAME = "index.json"


def write_mds(path: Path, tokens_RL: np.ndarray, valid_lengths_R: np.ndarray) -> None:
    """Write uint16/uint32 tokens [rows, length] and uint32 valid lengths [rows] to `path`."""
    from streaming.base.format.mds.writer import MDSWriter

    folder = temporary_name(path)  # the writer names its own files and adds an index: give it a folder
    shutil.rmtree(folder, ignore_errors=True)
    columns = _columns(tokens_RL.dtype.name, tokens_RL.shape[1])
    with MDSWriter(columns=columns, out=str(folder), size_limit=None) as writer:
        for tokens_L, valid_length in zip(tokens_RL, valid_lengths_R, strict=True):
            writer.write({"tokens": tokens_L, "valid_length": valid_length})
    commit(folder / "shard.00000.mds", path)
    shutil.rmtree(folder)


def write_mds_index(folder: str | Path, manifest: DatasetManifest) -> None:
    """Write the `index.json` by which `streaming.StreamingDataset` reads the folder too; ours needs none."""
    index = {"version": 2, "shards": [_index_entry(manifest, shard) for shard in manifest.shards]}
    atomic_write_bytes(Path(folder) / INDEX_NAME, json.dumps(index, sort_keys=True).encode())


def read_mds(path: Path, shard: Shard, manifest: DatasetManifest) -> tuple[np.ndarray, np.ndarray]:
    """Decode a shard to tokens [rows, length] and valid lengths [rows]; some 30 us a row.

    Raises:
        ValueError, IndexError: the file does not hold the rows that the manifest promises.
    """
    from streaming.base.format.mds.reader import MDSReader

    entry = _index_entry(manifest, shard)
    _check_header(path, shard.rows, sum(entry["column_sizes"]))
    entry["raw_data"]["basename"] = path.name
    reader = MDSReader.from_json(str(path.parent), None, entry)
    tokens_RL = np.empty((shard.rows, manifest.length_tokens), manifest.token_dtype)
    valid_lengths_R = np.empty(shard.rows, np.uint32)
    for row in range(shard.rows):
        sample = reader.get_item(row)
        tokens_RL[row] = sample["tokens"]
        valid_lengths_R[row] = sample["valid_length"]
    return tokens_RL, valid_lengths_R


def _check_header(path: Path, rows: int, row_bytes: int) -> None:
    """The count of rows, and offsets that step by a row and end with the file: the reader trusts them."""
    header = np.fromfile(path, "<u4", count=rows + 2).astype(np.int64)
    if header.size == 0 or header[0] != rows:
        raise ValueError(f"its header says {header[:1].tolist()} rows, the manifest {rows}")
    expected = path.stat().st_size - row_bytes * np.arange(rows, -1, -1)
    if not np.array_equal(header[1:], expected):
        raise ValueError(f"its row offsets do not fit {rows} rows of {row_bytes} bytes")


def _columns(token_dtype: str, length_tokens: int) -> dict[str, str]:
    return {"tokens": f"ndarray:{token_dtype}:{length_tokens}", "valid_length": "uint32"}


def _index_entry(manifest: DatasetManifest, shard: Shard) -> dict[str, Any]:
    """The shard's entry of an MDS index, format version 2."""
    columns = _columns(manifest.token_dtype, manifest.length_tokens)
    row_bytes = manifest.length_tokens * np.dtype(manifest.token_dtype).itemsize
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["sha256"],
        "size_limit": None,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": [row_bytes, 4],
        "raw_data": {"basename": shard.name, "bytes": shard.bytes, "hashes": {"sha256": shard.sha256}},
        "zip_data": None,
        "samples": shard.rows,
    }
