"""A run folder of image codes, as training would leave it: config, identity, VQ tokenizer and one checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from pgm_scale.checkpoint import CheckpointStore, Fragment, Kind
from pgm_scale.config import VQModelConfig
from pgm_scale.data.manifest import DatasetManifest, ImageContent, Shard, Vocabulary
from pgm_scale.models import build_model
from pgm_scale.models.vq import VQModel
from pgm_scale.run_folder import RunFolder
from pgm_scale.tensor_slices import TensorSlice
from pgm_scale.vq_tokenizer import VQTokenizer
from tests.tiny_data import tiny_config

CODEBOOK, SIDE_PIXELS, GRID_SIDE = 16, 8, 4
LENGTH, BOS = 1 + GRID_SIDE**2, CODEBOOK + 1
CLASS_NAMES = ("tench, Tinca tinca", "goldfish", "great white shark")
MODELS: dict[str, dict[str, Any]] = {
    "image_pgm": {
        "kind": "partition_transformer",
        "hidden_size": 16,
        "num_heads": 2,
        "num_encoder_blocks": 1,
        "num_decoder_blocks": 1,
        "condition_size": 16,
        "num_classes": len(CLASS_NAMES),
        "registers": 2,
    },
    "maskgit": {
        "kind": "maskgit_transformer",
        "hidden_size": 16,
        "num_heads": 2,
        "num_blocks": 1,
        "num_classes": len(CLASS_NAMES),
    },
}


def random_vq(seed: int = 0, image_channels: int = 3) -> VQTokenizer:
    torch.manual_seed(seed)
    config = VQModelConfig(
        codebook_size=CODEBOOK,
        code_size=4,
        channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        z_channels=32,
        image_channels=image_channels,
    )
    return VQTokenizer(VQModel(config))


def write_image_run(folder: Path, objective: str = "image_pgm", tokens: Any = "codes") -> Path:
    """With random weights everywhere. `tokens` may say that the data are other ones, None that they are text."""
    vq_folder = folder / "split"
    vq_folder.mkdir(parents=True)
    random_vq().save(vq_folder)
    tokenizer = vq_folder / "tokenizer.json"
    manifest = DatasetManifest(
        format="mds",
        split="train",
        vocabulary=Vocabulary(CODEBOOK + 2, mask_id=CODEBOOK, bos_id=BOS, eos_id=BOS, pad_id=None),
        tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        length_tokens=LENGTH,
        token_dtype="uint16",
        packing="images",
        source={},
        documents=1,
        rows=1,
        tokens=LENGTH,
        shards=(Shard("shard.00000.mds", 1, 1, "0" * 64),),
        images=ImageContent(tokens, SIDE_PIXELS, 3, GRID_SIDE, CLASS_NAMES) if tokens else None,
    )
    run = folder / "run"
    config = tiny_config(
        folder, run, model=MODELS[objective], objective={"kind": objective}, sampler={"steps": 5}
    )
    RunFolder(run).create_or_match(config, manifest, tokenizer)
    torch.manual_seed(1)
    model = build_model(config.model, manifest.vocabulary.size, LENGTH)
    fragments: list[tuple[Kind, Fragment]] = [
        (
            "weight",
            Fragment(name, TensorSlice.whole(parameter.shape), 0, torch.randn(parameter.numel()) * 0.3),
        )
        for name, parameter in model.named_parameters()
    ]
    CheckpointStore(run).save(3, fragments, {})
    return run
