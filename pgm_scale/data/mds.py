"""MDS shards (mosaicml-streaming's format), read and written directly: all rows at once, no import of the library.

Columns: `tokens` (`ndarray:<dtype>:<length>`), `valid_length` (`uint32`) and, of images, `label` (`uint32`), all of
fixed size, so a shard is its header and one array of records. The library takes 30 us a row to read, and 3 to 7 s
to be imported;
`tests/data/libraries.py` has its reader and writer, which this one equals, to the byte where it writes. The
column types come from our manifest, never from the file, so that nothing in a file is unpickled.

Layout, little-endian: rows (uint32), where each row starts and the last one ends (uint32 [rows + 1]), the
columns as JSON, the rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pgm_scale.data.batch import ShardRows
from pgm_scale.data.manifest import DatasetManifest, Shard
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, commit, temporary_name

INDEX_NAME = "index.json"


def write_mds(path: Path, rows: ShardRows) -> None:
    """Write the rows to `path`.

    Raises:
        UserError: the shard would not fit the format's 32-bit offsets.
    """
    count = len(rows.tokens_RL)
    row_dtype = _row_dtype(rows.tokens_RL.dtype.name, rows.tokens_RL.shape[1], rows.labels_R is not None)
    columns = _header_columns(row_dtype)
    largest = _largest_rows(row_dtype)
    if count > largest:
        raise UserError(
            f"{path}: {count} rows exceed the 4 GiB of an MDS shard; give --rows-per-shard {largest} or fewer"
        )
    start_bytes = 4 + 4 * (count + 1) + len(columns)
    rows_R = np.empty(count, row_dtype)
    rows_R["tokens"] = rows.tokens_RL
    rows_R["valid_length"] = rows.valid_lengths_R
    if rows.labels_R is not None:
        rows_R["label"] = rows.labels_R
    starts = start_bytes + row_dtype.itemsize * np.arange(count + 1)
    temporary = temporary_name(path)
    with open(temporary, "wb") as file:
        file.write(np.array([count, *starts], "<u4").tobytes() + columns)
        rows_R.tofile(file)
    commit(temporary, path)


def largest_rows(length_tokens: int, token_dtype: str, labelled: bool) -> int:
    """How many rows the format's 32-bit offsets allow in a shard."""
    return _largest_rows(_row_dtype(token_dtype, length_tokens, labelled))


def _largest_rows(row_dtype: np.dtype) -> int:
    return ((1 << 32) - 1 - 4 - 4 - len(_header_columns(row_dtype))) // (4 + row_dtype.itemsize)


def _header_columns(row_dtype: np.dtype) -> bytes:
    return json.dumps(_columns(row_dtype) | {"hashes": []}, sort_keys=True).encode()


def write_mds_index(folder: str | Path, manifest: DatasetManifest) -> None:
    """Write the `index.json` by which `streaming.StreamingDataset` reads the folder too; ours needs none."""
    index = {"version": 2, "shards": [_index_entry(manifest, shard) for shard in manifest.shards]}
    atomic_write_bytes(Path(folder) / INDEX_NAME, json.dumps(index, sort_keys=True).encode())


def read_mds(path: Path, shard: Shard, manifest: DatasetManifest) -> ShardRows:
    """Decode a shard to rows, views of one array of records.

    Raises:
        ValueError: the file does not hold the rows that the manifest promises.
    """
    row_dtype = _manifest_row_dtype(manifest)
    start_bytes = _check_header(path, shard.rows, row_dtype.itemsize)
    rows_R = np.fromfile(path, row_dtype, count=shard.rows, offset=start_bytes)
    labels_R = rows_R["label"] if manifest.images is not None else None
    return ShardRows(rows_R["tokens"], rows_R["valid_length"], labels_R)


def _check_header(path: Path, rows: int, row_bytes: int) -> int:
    """Where the rows start, of a header with their count and offsets that step by a row and end with the file."""
    header = np.fromfile(path, "<u4", count=rows + 2).astype(np.int64)
    if header.size == 0 or header[0] != rows:
        raise ValueError(f"its header says {header[:1].tolist()} rows, the manifest {rows}")
    expected = path.stat().st_size - row_bytes * np.arange(rows, -1, -1)
    if not np.array_equal(header[1:], expected):
        raise ValueError(f"its row offsets do not fit {rows} rows of {row_bytes} bytes")
    return int(expected[0])


def _manifest_row_dtype(manifest: DatasetManifest) -> np.dtype:
    return _row_dtype(manifest.token_dtype, manifest.length_tokens, manifest.images is not None)


def _row_dtype(token_dtype: str, length_tokens: int, labelled: bool) -> np.dtype:
    """A row as it is stored: its columns in the order of their names, without padding."""
    tokens = ("tokens", np.dtype(token_dtype).newbyteorder("<"), (length_tokens,))
    return np.dtype([*([("label", "<u4")] if labelled else []), tokens, ("valid_length", "<u4")])


def _columns(row_dtype: np.dtype) -> dict[str, Any]:
    """What a shard's header and its entry of the index say alike, format version 2."""
    columns = [row_dtype[name] for name in row_dtype.names or ()]
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "size_limit": None,
        "column_names": list(row_dtype.names or ()),
        "column_encodings": [
            f"ndarray:{column.base.name}:{column.shape[0]}" if column.shape else column.name
            for column in columns
        ],
        "column_sizes": [column.itemsize for column in columns],
    }


def _index_entry(manifest: DatasetManifest, shard: Shard) -> dict[str, Any]:
    """The shard's entry of an MDS index."""
    return _columns(_manifest_row_dtype(manifest)) | {
        "hashes": ["sha256"],
        "raw_data": {"basename": shard.name, "bytes": shard.bytes, "hashes": {"sha256": shard.sha256}},
        "zip_data": None,
        "samples": shard.rows,
    }
