"""Tiny image data as pixels, written by the real writers, and the configuration of a VQ run on it."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from pgm_scale.config import RunConfig
from pgm_scale.data.manifest import DatasetManifest, ImageContent, Vocabulary
from pgm_scale.data.mds import write_mds_index
from pgm_scale.data.writers import shard_name, write_shard
from tests.tiny_data import tiny_config

PIXEL_VOCABULARY = Vocabulary(size=256, mask_id=0, bos_id=0, eos_id=0, pad_id=None)
CLASSES = ("square", "cross")
VQ = {
    "kind": "vq",
    "codebook_size": 32,
    "code_size": 4,
    "channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 8,
    "image_channels": 1,
}


def blobs(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, side, side, 1] filled squares and crosses at random places, and their classes [count]."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(CLASSES), count)
    images = generator.integers(0, 32, (count, side, side, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = generator.integers(0, side - 3, 2)
        value = generator.integers(128, 256)
        if label == 0:
            image[row : row + 3, column : column + 3] = value
        else:
            image[row + 1, column : column + 3] = value
            image[row : row + 3, column + 1] = value
    return images, labels


def write_pixel_split(folder: Path, images_BHWC: np.ndarray, labels_B: np.ndarray, split: str) -> Path:
    """One shard of images."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text('{"kind": "pixels"}\n')
    rows, side, _, channels = images_BHWC.shape
    length = side * side * channels
    tokens_RL = np.ascontiguousarray(images_BHWC.reshape(rows, length))
    shard = write_shard(folder, shard_name(0, "mds"), "mds", tokens_RL, np.full(rows, length), labels_B)
    manifest = DatasetManifest(
        format="mds",
        split=split,
        vocabulary=PIXEL_VOCABULARY,
        tokenizer_sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        length_tokens=length,
        token_dtype="uint8",
        packing="images",
        source={},
        documents=rows,
        rows=rows,
        tokens=rows * length,
        shards=(shard,),
        images=ImageContent("pixels", side, channels, side, CLASSES),
    )
    write_mds_index(folder, manifest)
    manifest.save(folder)
    return folder


def write_blobs(folder: Path) -> Path:
    write_pixel_split(folder / "train", *blobs(64, 8, 1), "train")
    write_pixel_split(folder / "validation", *blobs(16, 8, 2), "validation")
    return folder


def vq_config(data: Path, run: Path, **changes: Any) -> RunConfig:
    """A VQ run of a few seconds."""
    return tiny_config(data, run, **{"model": VQ, "objective": {"kind": "vq"}} | changes)
