"""A small split of image codes that no tokenizer made, for runs in which images are never decoded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pgm_scale.data.manifest import VQ_WEIGHTS_NAME, DatasetManifest, ImageContent, ShardFormat, Vocabulary
from pgm_scale.data.mds import write_mds_index
from pgm_scale.data.writers import shard_name, write_shard
from pgm_scale.files import sha256_file


def write_code_split(
    folder: Path,
    split: str,
    tokens_RL: np.ndarray,
    labels_R: np.ndarray,
    vocabulary: Vocabulary,
    class_names: Sequence[str],
    shard_format: ShardFormat = "mds",
) -> Path:
    """Rows of BOS and a square of codes in one shard, beside an empty file of VQ weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, weights = folder / "tokenizer.json", folder / VQ_WEIGHTS_NAME
    weights.touch()
    tokenizer.write_text(json.dumps({"kind": "vq", "weights_sha256": sha256_file(weights)}))
    rows, length = tokens_RL.shape
    shard = write_shard(
        folder, shard_name(0, shard_format), shard_format, tokens_RL, np.full(rows, length), labels_R
    )
    manifest = DatasetManifest(
        format=shard_format,
        split=split,
        vocabulary=vocabulary,
        tokenizer_sha256=sha256_file(tokenizer),
        length_tokens=length,
        token_dtype="uint16",
        packing="images",
        source={},
        documents=rows,
        rows=rows,
        tokens=tokens_RL.size,
        shards=(shard,),
        images=ImageContent("codes", 8, 1, math.isqrt(length - 1), tuple(class_names)),
    )
    if shard_format == "mds":
        write_mds_index(folder, manifest)
    manifest.save(folder)
    return folder
