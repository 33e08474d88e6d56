"""Small split folders of both formats, and the rows that are in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pgm_scale.data import DatasetManifest, Vocabulary
from pgm_scale.data.manifest import ImageContent, ShardFormat
from pgm_scale.data.writers import shard_name, write_mds_index, write_shard

VOCABULARY = Vocabulary(size=1001, mask_id=1000, bos_id=7, eos_id=7, pad_id=None)
LENGTH_TOKENS = 16
ROWS_PER_SHARD = (300, 20, 7, 41, 64)
CLASS_NAMES = ("cat", "dog", "eel")
PIXELS = ImageContent("pixels", side_pixels=4, channels=1, grid_side=4, class_names=CLASS_NAMES)


@dataclass
class Split:
    folder: Path
    manifest: DatasetManifest
    tokens: list[np.ndarray]
    valid_lengths: list[np.ndarray]
    labels: list[np.ndarray] | None = None


def make_split(folder: Path, format: ShardFormat, rows_per_shard=ROWS_PER_SHARD) -> Split:
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    tokens = [rng.integers(0, 1000, (rows, LENGTH_TOKENS)).astype(np.uint16) for rows in rows_per_shard]
    valid_lengths = [rng.integers(1, LENGTH_TOKENS + 1, rows) for rows in rows_per_shard]
    shards = [
        write_shard(folder, shard_name(number, format), format, tokens_RL, valid_lengths_R)
        for number, (tokens_RL, valid_lengths_R) in enumerate(zip(tokens, valid_lengths, strict=True))
    ]
    manifest = DatasetManifest(
        format=format,
        split="train",
        vocabulary=VOCABULARY,
        tokenizer_sha256="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",  # of {}
        length_tokens=LENGTH_TOKENS,
        token_dtype="uint16",
        packing="wrap",
        source={"files": ["a.txt"]},
        documents=12,
        rows=sum(rows_per_shard),
        tokens=int(sum(v.sum() for v in valid_lengths)),
        shards=tuple(shards),
    )
    manifest.save(folder)
    if format == "mds":
        write_mds_index(folder, manifest)
    return Split(folder, manifest, tokens, valid_lengths)


def make_pixel_split(folder: Path, format: ShardFormat, rows_per_shard=ROWS_PER_SHARD) -> Split:
    """Gray images of 4 x 4 pixels, of three classes."""
    rng = np.random.default_rng(4)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    tokens = [rng.integers(0, 256, (rows, LENGTH_TOKENS)).astype(np.uint8) for rows in rows_per_shard]
    valid_lengths = [np.full(rows, LENGTH_TOKENS) for rows in rows_per_shard]
    labels = [rng.integers(0, len(CLASS_NAMES), rows) for rows in rows_per_shard]
    shards = [
        write_shard(folder, shard_name(number, format), format, *columns)
        for number, columns in enumerate(zip(tokens, valid_lengths, labels, strict=True))
    ]
    manifest = DatasetManifest(
        format=format,
        split="train",
        vocabulary=Vocabulary(size=256, mask_id=0, bos_id=0, eos_id=0, pad_id=None),
        tokenizer_sha256="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",  # of {}
        length_tokens=LENGTH_TOKENS,
        token_dtype="uint8",
        packing="image",
        source={},
        documents=sum(rows_per_shard),
        rows=sum(rows_per_shard),
        tokens=sum(rows_per_shard) * LENGTH_TOKENS,
        shards=tuple(shards),
        images=PIXELS,
    )
    manifest.save(folder)
    if format == "mds":
        write_mds_index(folder, manifest)
    return Split(folder, manifest, tokens, valid_lengths, labels)


@pytest.fixture(params=["mds", "tar"])
def pixel_split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    return make_pixel_split(tmp_path / "pixels", request.param)


@pytest.fixture(params=["mds", "tar"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    return make_split(tmp_path / "split", request.param)


def flip_bit(path: Path, offset: int = -50) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))
