"""A tiny data set with structure to learn, written by the real writers, and a run configuration for it."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from pgm_scale import config as configuration
from pgm_scale.config import RunConfig
from pgm_scale.data.manifest import DatasetManifest, Vocabulary
from pgm_scale.data.mds import write_mds_index
from pgm_scale.data.writers import shard_name, write_shard

LENGTH = 16
VOCABULARY = Vocabulary(size=24, mask_id=23, bos_id=0, eos_id=0, pad_id=None)


def write_tiny_split(folder: Path, rows: int, seed: int, split: str, pad: bool = False) -> Path:
    """Rows that repeat one random token after BOS, in two shards; with `pad`, of random valid lengths."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY.size - 1)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    generator = np.random.default_rng(seed)
    repeated = generator.integers(1, VOCABULARY.mask_id, size=(rows, 1))
    tokens = np.broadcast_to(repeated, (rows, LENGTH)).astype(np.uint16)
    tokens[:, 0] = VOCABULARY.bos_id
    valid = generator.integers(4, LENGTH + 1, rows) if pad else np.full(rows, LENGTH)
    half = rows // 2
    shards = [
        write_shard(folder, shard_name(i, "mds"), "mds", tokens[part], valid[part])
        for i, part in enumerate((slice(0, half), slice(half, rows)))
    ]
    manifest = DatasetManifest(
        format="mds",
        split=split,
        vocabulary=VOCABULARY,
        tokenizer_sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        length_tokens=LENGTH,
        token_dtype="uint16",
        packing="pad" if pad else "wrap",
        source={},
        documents=rows,
        rows=rows,
        tokens=int(valid.sum()),
        shards=tuple(shards),
    )
    write_mds_index(folder, manifest)
    manifest.save(folder)
    return folder


def write_tiny_data(folder: Path, pad: bool = False) -> Path:
    write_tiny_split(folder / "train", 100, 1, "train", pad)
    write_tiny_split(folder / "validation", 20, 2, "validation", pad)
    return folder


def tiny_config(data: Path, run: Path, **changes: Any) -> RunConfig:
    """A run of a few seconds; `changes` are sections whose keys replace those of the default."""
    tree: dict[str, Any] = {
        "folder": str(run),
        "data": {"train": str(data / "train"), "validation": str(data / "validation")},
        "model": {
            "kind": "partition_transformer",
            "hidden_size": 16,
            "num_heads": 2,
            "num_encoder_blocks": 1,
            "num_decoder_blocks": 1,
            "condition_size": 8,
            "dropout": 0.0,
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.01},
        "training": {
            "steps": 6,
            "global_batch_sequences": 8,
            "micro_batch_sequences": 2,
            "precision": "fp32",
            "log_interval_steps": 1,
        },
        "checkpoint": {"interval_steps": 3},
        "validation": {"interval_steps": 6, "sequences": 16, "samples": 1},
        "sampler": {"steps": 4},
    }
    for section, values in changes.items():
        old = tree.get(section, {})
        tree[section] = values if section == "objective" or "kind" in values else {**old, **values}
    problems: list[str] = []
    config = configuration.parse(RunConfig, tree, problems)
    assert not problems, problems
    assert isinstance(config, RunConfig)
    assert not configuration.inconsistencies(config)
    return config
