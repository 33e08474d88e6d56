"""A shard file to arrays. What is decoded is checked against the manifest."""

from __future__ import annotations

import tarfile
from pathlib import Path
from tokenize import TokenError

import numpy as np

from pgm_scale.data.batch import ShardRows
from pgm_scale.data.manifest import DatasetManifest, Shard
from pgm_scale.data.mds import read_mds
from pgm_scale.data.tar import read_tar
from pgm_scale.errors import UserError

# What tarfile and numpy raise at headers that nobody wrote: numbers, offsets and texts that are none.
_HOSTILE = (ValueError, LookupError, OSError, ArithmeticError, EOFError, RecursionError, TokenError)


def read_shard(path: Path, shard: Shard, manifest: DatasetManifest) -> ShardRows:
    """Decode a whole shard.

    Returns:
        Tokens of the manifest's `token_dtype`; labels if the manifest is of images.

    Raises:
        UserError: the file is not the shard that the manifest describes; names it and says why.
    """
    read = read_mds if manifest.format == "mds" else read_tar
    try:
        rows = read(path, shard, manifest)
        _check(rows, shard, manifest)
    except (tarfile.TarError, *_HOSTILE) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: not the {manifest.format} shard that dataset.json describes: {reason}; "
            "prepare the dataset again"
        ) from error
    return rows


def _check(rows: ShardRows, shard: Shard, manifest: DatasetManifest) -> None:
    tokens_RL, valid_lengths_R, labels_R = rows
    expected = (shard.rows, manifest.length_tokens)
    if tokens_RL.shape != expected or tokens_RL.dtype != manifest.token_dtype:
        raise ValueError(
            f"its tokens are {tokens_RL.dtype}{list(tokens_RL.shape)}, "
            f"not {manifest.token_dtype}{list(expected)}"
        )
    if valid_lengths_R.shape != (shard.rows,) or valid_lengths_R.dtype.kind != "u":
        raise ValueError(f"its valid lengths are {valid_lengths_R.dtype}{list(valid_lengths_R.shape)}")
    if not 1 <= valid_lengths_R.min() <= valid_lengths_R.max() <= manifest.length_tokens:
        row = _first((valid_lengths_R < 1) | (valid_lengths_R > manifest.length_tokens))
        raise ValueError(f"its row {row} has a valid length outside 1..{manifest.length_tokens}")
    if tokens_RL.max() >= manifest.vocabulary.size:
        row = _first(tokens_RL.max(axis=1) >= manifest.vocabulary.size)
        raise ValueError(
            f"its row {row} has token {tokens_RL[row].max()}, the vocabulary ends at {manifest.vocabulary.size}"
        )
    if labels_R is None or manifest.images is None:
        return
    if labels_R.shape != (shard.rows,) or labels_R.dtype.kind != "u":
        raise ValueError(f"its labels are {labels_R.dtype}{list(labels_R.shape)}")
    if labels_R.max() >= len(manifest.images.class_names):
        row = _first(labels_R >= len(manifest.images.class_names))
        raise ValueError(
            f"its row {row} has label {labels_R[row]} of {len(manifest.images.class_names)} classes"
        )


def _first(bad_R: np.ndarray) -> int:
    return int(bad_R.argmax())
