"""The layouts of published files (FACTS 9): a file or folder to a `ForeignCheckpoint`, and back.

lightning      one file {state_dict, ema: {decay, num_updates, shadow_params}, hyper_parameters, global_step, ...}
image          one file {iter, global_epoch, model_state_dict, optimizer_state_dict}
hugging_face   a folder of config.json and model.safetensors, or pytorch_model.bin
vq             one file {model, ema?}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pgm_scale.convert.checkpoint import ForeignCheckpoint, Layout
from pgm_scale.convert.plain import plain, tokenizer_json
from pgm_scale.convert.torch_file import named_tensors, open_torch_file
from pgm_scale.errors import UserError
from pgm_scale.export.folder import new_folder
from pgm_scale.files import commit, read_bounded, temporary_name

_CONFIG_NAME, _SAFETENSORS_NAME, _BIN_NAME = "config.json", "model.safetensors", "pytorch_model.bin"
_LISTED = 8


def read_checkpoint(path: str | Path) -> ForeignCheckpoint:
    """Read a file or folder, whose layout is told by what is in it.

    Raises:
        UserError: it is missing, damaged, or of no layout of these.
    """
    path = Path(path)
    if path.is_dir():
        return _read_hugging_face(path)
    content = open_torch_file(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no dict of tensors; give a published checkpoint")
    if isinstance(content.get("state_dict"), Mapping):
        return _read_lightning(path, content)
    if isinstance(content.get("model_state_dict"), Mapping):
        tensors = _tensors(content["model_state_dict"], path)
        return ForeignCheckpoint("image", path, path, tensors, step=_step(content.get("iter")))
    if any(isinstance(content.get(key), Mapping) for key in ("model", "ema")):
        return _read_vq(path, content)
    keys = ", ".join(ascii(key)[:50] for key in list(content)[:_LISTED])
    raise UserError(
        f"{path} has no state_dict, model_state_dict or model, but {keys or 'nothing'}; give a published checkpoint"
    )


def _read_lightning(path: Path, content: Mapping[Any, Any]) -> ForeignCheckpoint:
    hyper_parameters = content.get("hyper_parameters")
    try:
        stored = plain(hyper_parameters)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    average = content.get("ema")
    tokenizer = hyper_parameters.get("tokenizer") if isinstance(hyper_parameters, Mapping) else None
    return ForeignCheckpoint(
        "lightning",
        path,
        path,
        _tensors(content["state_dict"], path),
        None if not average else _shadow(average),
        hyper_parameters=stored if isinstance(stored, dict) else {},
        tokenizer_json=tokenizer_json(tokenizer),
        step=_step(content.get("global_step")),
    )


def _shadow(average: Any) -> list[Tensor]:
    """Empty of anything but a list of tensors: that fits no model, and only those who ask for it hear of it."""
    shadow = average.get("shadow_params") if isinstance(average, Mapping) else None
    if not isinstance(shadow, (list, tuple)) or not all(isinstance(item, Tensor) for item in shadow):
        return []
    return list(shadow)


def _read_vq(path: Path, content: Mapping[Any, Any]) -> ForeignCheckpoint:
    named = {
        key: _tensors(content[key], path) for key in ("model", "ema") if isinstance(content.get(key), Mapping)
    }
    tensors = named.get("model") or named["ema"]
    step = _step(content.get("steps"))
    return ForeignCheckpoint("vq", path, path, tensors, average_by_key=named.get("ema"), step=step)


def _read_hugging_face(folder: Path) -> ForeignCheckpoint:
    try:
        config = json.loads(read_bounded(folder / _CONFIG_NAME))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {folder / _CONFIG_NAME} ({type(error).__name__}); give a folder of config.json and "
            f"{_SAFETENSORS_NAME} or {_BIN_NAME}, or --to FORMAT to convert a run"
        ) from None
    weights_path = folder / _SAFETENSORS_NAME
    if weights_path.is_file():
        try:
            tensors = safetensors.torch.load_file(weights_path)
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{weights_path} is damaged ({_line(error)}); download or copy it again"
            ) from None
    else:
        weights_path = folder / _BIN_NAME
        content = open_torch_file(weights_path)
        tensors = _tensors(content if isinstance(content, Mapping) else {}, weights_path)
    return ForeignCheckpoint(
        "hugging_face",
        folder,
        weights_path,
        tensors,
        hyper_parameters=config if isinstance(config, dict) else {},
        step=_step(config.get("step")) if isinstance(config, dict) else None,
    )


def _tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    tensors, others = named_tensors(content)
    if others or not tensors:
        found = ", ".join(map(ascii, others[:_LISTED])) or "nothing"
        raise UserError(f"{path}: {found} in the place of tensors; give a published checkpoint")
    return tensors


def _step(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 60 else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def write_checkpoint(checkpoint: ForeignCheckpoint, ema_decay: float = 0.0) -> None:
    """Write `checkpoint.path` in its layout: whole or not at all, tensors and plain values only.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if checkpoint.layout == "hugging_face":
            _write_hugging_face(checkpoint)
            return
        content = _CONTENTS[checkpoint.layout](checkpoint, ema_decay)
        temporary = temporary_name(checkpoint.path)
        try:
            torch.save(content, temporary)
            commit(temporary, checkpoint.path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's for a full disk
        raise UserError(f"cannot write {checkpoint.path} ({_line(error)}); choose another place") from None


def _lightning_content(checkpoint: ForeignCheckpoint, ema_decay: float) -> dict[str, Any]:
    return {
        "epoch": 0,
        "global_step": checkpoint.step or 0,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": checkpoint.tensors,
        "ema": {"decay": ema_decay, "num_updates": checkpoint.step or 0, "shadow_params": checkpoint.average},
        "hyper_parameters": checkpoint.hyper_parameters,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }


def _image_content(checkpoint: ForeignCheckpoint, ema_decay: float) -> dict[str, Any]:
    return {
        "iter": checkpoint.step or 0,
        "global_epoch": 0,
        "model_state_dict": checkpoint.tensors,
        "optimizer_state_dict": None,
    }


def _vq_content(checkpoint: ForeignCheckpoint, ema_decay: float) -> dict[str, Any]:
    return {"model": checkpoint.tensors, "steps": checkpoint.step or 0}


_CONTENTS = {"lightning": _lightning_content, "image": _image_content, "vq": _vq_content}


def _write_hugging_face(checkpoint: ForeignCheckpoint) -> None:
    config = json.dumps(checkpoint.hyper_parameters, indent=2) + "\n"
    with new_folder(checkpoint.path) as folder:
        safetensors.torch.save_file(checkpoint.tensors, folder / _SAFETENSORS_NAME, metadata={"format": "pt"})
        (folder / _CONFIG_NAME).write_bytes(config.encode())


def weights_path_of(layout: Layout, path: Path) -> Path:
    return path / _SAFETENSORS_NAME if layout == "hugging_face" else path
