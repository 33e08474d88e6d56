"""Run folders of every kind of model, as training would leave them, with random weights and averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pgm_scale.checkpoint import CheckpointStore, Fragment, Kind
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.models import build_model
from pgm_scale.run_folder import RunFolder
from pgm_scale.tensor_slices import TensorSlice
from tests.sampling.image_runs import write_image_run
from tests.tiny_data import tiny_config, write_tiny_data

STEP = 4
_SIZE = {"hidden_size": 16, "num_heads": 2, "dropout": 0.0}
_TEXT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # model, objective, sampler
    "pgm": (
        {
            "kind": "partition_transformer",
            "num_encoder_blocks": 2,
            "num_decoder_blocks": 1,
            "condition_size": 8,
        },
        {"kind": "pgm"},
        "pgm_uniform",
    ),
    "mdlm": (
        {"kind": "diffusion_transformer", "num_blocks": 2, "condition_size": 8},
        {"kind": "mdlm"},
        "ancestral_cached",
    ),
    "d3pm": (
        {"kind": "diffusion_transformer", "num_blocks": 2, "condition_size": 8, "time_conditioned": True},
        {"kind": "d3pm"},
        "ancestral",
    ),
    "ar": (
        {"kind": "autoregressive_transformer", "num_blocks": 2},
        {"kind": "autoregressive"},
        "autoregressive",
    ),
}
IMAGE_KINDS = ("image_pgm", "maskgit")
KINDS = (*_TEXT, *IMAGE_KINDS)


def write_run(folder: Path, kind: str, weight_scale: float = 0.3) -> Path:
    if kind in IMAGE_KINDS:
        return write_image_run(folder, kind)
    model, objective, sampler = _TEXT[kind]
    data, run = write_tiny_data(folder / "data"), folder / "run"
    config = tiny_config(
        data, run, model={**model, **_SIZE}, objective=objective, sampler={"kind": sampler, "steps": 4}
    )
    manifest = DatasetManifest.load(data / "train")
    RunFolder(run).create_or_match(config, manifest, data / "train" / "tokenizer.json")
    built = build_model(config.model, manifest.vocabulary.size, manifest.length_tokens)
    torch.manual_seed(1)
    kinds: tuple[Kind, ...] = ("weight", "ema")
    fragments = [
        (stored, whole(name, torch.randn(parameter.shape) * weight_scale))
        for name, parameter in built.named_parameters()
        for stored in kinds
    ]
    CheckpointStore(run).save(STEP, fragments, {})
    return run


def whole(name: str, values: torch.Tensor) -> Fragment:
    """A tensor as one process saves it."""
    return Fragment(name, TensorSlice.whole(values.shape), 0, values.flatten())
