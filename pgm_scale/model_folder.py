"""An exported model: one folder that this package, transformers and people can read.

    <folder>/config.json                  what transformers looks for, and `description`: a `ModelDescription`
    <folder>/model.safetensors            the weights, published names behind `backbone.`; of large models
    <folder>/model.safetensors.index.json   and model-00001-of-0000N.safetensors instead
    <folder>/tokenizer.json               as the training data have it; of images vq.safetensors beside it
    <folder>/README.md                    the model card, for people

`pgm_scale.export` writes it. Reading takes torch, numpy, safetensors and pyyaml, neither deepspeed nor megatron.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pgm_scale import config as configuration
from pgm_scale.errors import UserError
from pgm_scale.models import build_model
from pgm_scale.trained_model import ModelDescription, TrainedModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MODEL_TYPE = "pgm_scale"  # `model_type` of config.json
PREFIX = "backbone."  # of the weights' names, as in the published files


def is_model_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG_NAME).is_file()


def read_description(folder: str | Path) -> ModelDescription:
    """What config.json says of the model.

    Raises:
        UserError: it is missing, garbled, or no exported model's.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); give a folder of `pgm-scale export`") from None
    if not isinstance(tree, dict) or tree.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{path} is not of an exported model (no model_type {MODEL_TYPE}); use `pgm-scale export`"
        )
    problems: list[str] = []
    description = configuration.parse(ModelDescription, tree.get("description"), problems, "description")
    if problems:
        raise UserError(f"{path} is damaged: {'; '.join(problems)}; export the model again")
    return description


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of an exported folder, by the model's own names, in the type that they are stored in.

    Raises:
        UserError: a file is missing, damaged, or holds something else.
    """
    folder, tensors = Path(folder), {}
    for name in _weight_files(folder):
        try:
            with safe_open(folder / name, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    if not key.startswith(PREFIX):
                        raise UserError(
                            f"{folder / name}: {key} does not start with {PREFIX}; export the model again"
                        )
                    tensors[key.removeprefix(PREFIX)] = stored.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {folder / name}: {error}; copy or export the folder again"
            ) from None
    return tensors


def load_folder(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TrainedModel:
    """The model of an exported folder.

    Raises:
        UserError: no such folder, a damaged one, or one whose weights do not fit its description.
    """
    folder = Path(folder)
    description = read_description(folder)
    model = build_model(description.model, description.vocabulary.size, description.length_tokens)
    copy_weights(model, read_weights(folder), f"{folder / WEIGHTS_NAME}")
    model.eval().requires_grad_(False)
    return TrainedModel(model.to(device, dtype), description, folder)


def copy_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Fill every parameter of a model.

    Raises:
        UserError: one line for each name that is missing, unknown, or of another shape.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    problems = [
        f"{name}: {_difference(expected.get(name), found.get(name))}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if problems:
        raise UserError(f"{where} does not fit the model:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def _difference(expected: Any, found: Any) -> str:
    if found is None:
        return f"missing, the model has {expected}"
    return "unknown to the model" if expected is None else f"shape {found}, the model has {expected}"


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if not index.is_file():
        return [WEIGHTS_NAME]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError("file names expected")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error}); copy or export the folder again") from None
    return names
