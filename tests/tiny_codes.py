"""Tiny data of image codes with something to learn, written by the real writers, and a MaskGIT run on it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pgm_scale.config import RunConfig
from pgm_scale.data.manifest import VQ_WEIGHTS_NAME, DatasetManifest, ImageContent, Vocabulary
from pgm_scale.data.mds import write_mds_index
from pgm_scale.data.writers import shard_name, write_shard
from tests.tiny_data import tiny_config

CODEBOOK, GRID_SIDE = 20, 4
CLASSES = ("low", "high")
CODE_VOCABULARY = Vocabulary(
    size=CODEBOOK + 2, mask_id=CODEBOOK, bos_id=CODEBOOK + 1, eos_id=CODEBOOK + 1, pad_id=None
)


def write_code_split(folder: Path, rows: int, seed: int, split: str) -> Path:
    """Images of one code each, of the lower or the upper half of the codebook, by their class; no VQ made them."""
    folder.mkdir(parents=True)
    weights = folder / VQ_WEIGHTS_NAME
    weights.write_bytes(b"")
    description = {"kind": "vq", "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(CLASSES), rows)
    codes = generator.integers(0, CODEBOOK // 2, rows) + labels * (CODEBOOK // 2)
    tokens = np.broadcast_to(codes[:, None], (rows, 1 + GRID_SIDE**2)).astype(np.uint16)
    tokens[:, 0] = CODE_VOCABULARY.bos_id
    valid = np.full(rows, tokens.shape[1])
    manifest = DatasetManifest(
        format="mds",
        split=split,
        vocabulary=CODE_VOCABULARY,
        tokenizer_sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        length_tokens=tokens.shape[1],
        token_dtype="uint16",
        packing="images",
        source={},
        documents=rows,
        rows=rows,
        tokens=tokens.size,
        shards=(write_shard(folder, shard_name(0, "mds"), "mds", tokens, valid, labels),),
        images=ImageContent("codes", 8, 1, GRID_SIDE, CLASSES),
    )
    write_mds_index(folder, manifest)
    manifest.save(folder)
    return folder


def write_codes(folder: Path) -> Path:
    write_code_split(folder / "train", 100, 1, "train")
    write_code_split(folder / "validation", 20, 2, "validation")
    return folder


def maskgit_run(data: Path, run: Path, **changes: Any) -> RunConfig:
    """A MaskGIT run of a few seconds, which writes no images; `changes` are sections, as for `tiny_config`."""
    model = {
        "kind": "maskgit_transformer",
        "hidden_size": 16,
        "num_heads": 2,
        "num_blocks": 2,
        "num_classes": len(CLASSES),
        "dropout": 0.0,
        **changes.pop("model", {}),
    }
    validation = {"samples": 0, **changes.pop("validation", {})}
    sections = {"model": model, "objective": {"kind": "maskgit"}, "validation": validation}
    return tiny_config(data, run, **sections | changes)
