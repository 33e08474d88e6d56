"""Tiny data of image codes with something to learn, written by the real writers, and a MaskGIT run on it."""

from pathlib import Path
from typing import Any

import numpy as np

from ops.code_split import write_code_split
from pgm_scale.config import RunConfig
from pgm_scale.data.manifest import Vocabulary
from tests.tiny_data import tiny_config

CODEBOOK, GRID_SIDE = 20, 4
CLASSES = ("low", "high")
CODE_VOCABULARY = Vocabulary(
    size=CODEBOOK + 2, mask_id=CODEBOOK, bos_id=CODEBOOK + 1, eos_id=CODEBOOK + 1, pad_id=None
)


def write_codes(folder: Path) -> Path:
    for seed, (split, rows) in enumerate({"train": 100, "validation": 20}.items(), start=1):
        tokens, labels = _images_of_one_code(rows, np.random.default_rng(seed))
        write_code_split(folder / split, split, tokens, labels, CODE_VOCABULARY, CLASSES)
    return folder


def _images_of_one_code(rows: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and classes: each image is one code, of the lower or the upper half of the codebook, by its class."""
    labels = generator.integers(0, len(CLASSES), rows)
    codes = generator.integers(0, CODEBOOK // 2, rows) + labels * (CODEBOOK // 2)
    tokens = np.broadcast_to(codes[:, None], (rows, 1 + GRID_SIDE**2)).astype(np.uint16)
    tokens[:, 0] = CODE_VOCABULARY.bos_id
    return tokens, labels


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
