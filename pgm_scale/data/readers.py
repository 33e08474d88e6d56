"""A shard file to arrays. What is decoded is checked against the manifest."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np

from pgm_scale.data.manifest import DatasetManifest, Shard
from pgm_scale.data.mds import read_mds
from pgm_scale.data.tar import read_tar
from pgm_scale.errors import UserError


def read_shard(path: Path, shard: Shard, manifest: DatasetManifest) -> tuple[np.ndarray, np.ndarray]:
    """Decode a whole shard.

    Returns:
        tokens_RL: [rows, length] of the manifest's `token_dtype`.
        valid_lengths_R: integers [rows], 1 to length.

    Raises:
        UserError: the file is not the shard that the manifest describes; names it and says why.
    """
    read = read_mds if manifest.format == "mds" else read_tar
    try:
        tokens_RL, valid_lengths_R = read(path, shard, manifest)
        _check(tokens_RL, valid_lengths_R, shard, manifest)
    except (ValueError, LookupError, OSError, tarfile.TarError) as error:
        raise UserError(
            f"{path}: not the {manifest.format} shard that dataset.json describes: {error}; "
            "prepare the dataset again"
        ) from error
    return tokens_RL, valid_lengths_R


def _check(
    tokens_RL: np.ndarray, valid_lengths_R: np.ndarray, shard: Shard, manifest: DatasetManifest
) -> None:
    expected = (shard.rows, manifest.length_tokens)
    if tokens_RL.shape != expected or tokens_RL.dtype != manifest.token_dtype:
        raise ValueError(
            f"its tokens are {tokens_RL.dtype}{list(tokens_RL.shape)}, "
            f"not {manifest.token_dtype}{list(expected)}"
        )
    if valid_lengths_R.shape != (shard.rows,) or valid_lengths_R.dtype.kind != "u":
        raise ValueError(f"its valid lengths are {valid_lengths_R.dtype}{list(valid_lengths_R.shape)}")
    if not 1 <= valid_lengths_R.min() <= valid_lengths_R.max() <= manifest.length_tokens:
        raise ValueError(f"it has a valid length outside 1..{manifest.length_tokens}")
    if tokens_RL.max() >= manifest.vocabulary.size:
        raise ValueError(f"it has token {tokens_RL.max()}, the vocabulary ends at {manifest.vocabulary.size}")
