"""Writing an exported folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from pgm_scale import config as configuration
from pgm_scale.data.manifest import TOKENIZER_NAME, VQ_WEIGHTS_NAME
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes
from pgm_scale.model_folder import CONFIG_NAME, INDEX_NAME, MODEL_TYPE, PREFIX
from pgm_scale.trained_model import TrainedModel

MAX_SHARD_BYTES = 5_000_000_000


def write_model_folder(
    folder: str | Path,
    trained: TrainedModel,
    card: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model as an exported folder; config.json comes last, so a folder that has one is complete.

    Args:
        folder: new or empty.
        trained: its folder's tokenizer.json and vq.safetensors, where there are any, are copied.
        card: README.md, the model card.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(folder, trained, dtype, max_shard_bytes)
        for name in (TOKENIZER_NAME, VQ_WEIGHTS_NAME):
            if (trained.folder / name).is_file():
                shutil.copyfile(trained.folder / name, folder / name)
        atomic_write_bytes(folder / "README.md", card.encode())
        atomic_write_bytes(folder / CONFIG_NAME, _config_json(trained, dtype).encode())
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another place") from None


def _write_weights(folder: Path, trained: TrainedModel, dtype: torch.dtype, max_shard_bytes: int) -> None:
    tensors = {
        f"{PREFIX}{name}": parameter.detach().cpu().to(dtype).contiguous()
        for name, parameter in trained.model.named_parameters()
    }
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_bytes)
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        atomic_write_bytes(folder / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())


def _config_json(trained: TrainedModel, dtype: torch.dtype) -> str:
    tree = {
        "model_type": MODEL_TYPE,
        "architectures": ["PGMScaleModel"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "description": configuration.to_mapping(trained.description),
    }
    return json.dumps(tree, indent=2) + "\n"
