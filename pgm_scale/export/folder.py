"""Writing an exported folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from pgm_scale import __version__
from pgm_scale import config as configuration
from pgm_scale.data.manifest import TOKENIZER_NAME, VQ_WEIGHTS_NAME
from pgm_scale.errors import UserError
from pgm_scale.export.bundle import ENTRY_NAME, bundled_files
from pgm_scale.export.companions import generation_config, tokenizer_config
from pgm_scale.files import fsync_folder, sha256_file, temporary_name
from pgm_scale.model_folder import CHECKSUMS_NAME, CONFIG_NAME, INDEX_NAME, MODEL_TYPE, PREFIX, VERSION_KEY
from pgm_scale.trained_model import TrainedModel

MAX_SHARD_BYTES = 5_000_000_000


def write_model_folder(
    folder: str | Path,
    trained: TrainedModel,
    card: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write a model as an exported folder: it appears whole, or not at all.

    Until it is whole it has a hidden name beside its own, and the next attempt takes that over.

    Args:
        folder: new or empty.
        trained: its folder's tokenizer.json and vq.safetensors, where there are any, are copied.
        card: README.md, the model card.
        check: called with the finished folder before it gets its name; may refuse it with an error.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    with new_folder(Path(folder)) as staged:
        _write_all(staged, trained, card, dtype, max_shard_bytes)
        check(staged)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to write a folder's files, which get its name, synced, when the block ends without an error.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    check_free(folder)
    staged = temporary_name(folder.absolute())
    with _alone_in(staged, folder):
        yield from _filled(staged, folder)


@contextmanager
def _alone_in(staged: Path, folder: Path) -> Iterator[None]:
    """Two commands that write one folder would mix their files; the lock ends with its process.

    Raises:
        UserError: another one is at it.
    """
    try:
        staged.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another place") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(staged)):
            raise FileNotFoundError  # it has just got its name
        yield
    except (BlockingIOError, FileNotFoundError):
        raise UserError(f"{folder}: another command is writing it; wait for it, or give another") from None
    finally:
        os.close(descriptor)


def _filled(staged: Path, folder: Path) -> Iterator[Path]:
    try:
        for left in staged.iterdir():  # of one that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield staged
        mode = 0o666 & ~_umask()  # safetensors gives its files to their owner alone
        for path in staged.iterdir():
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(staged)
        staged.rename(folder)
        fsync_folder(staged.parent)
    except (OSError, SafetensorError) as error:  # SafetensorError: for a full disk
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write {folder}: {reason}; choose another place") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _umask() -> int:
    """Of this process, which only tells it when it is set."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def check_free(folder: Path) -> None:
    """Raises: UserError: the folder holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder")


def _write_all(
    folder: Path, trained: TrainedModel, card: str, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    _write_weights(folder, trained, dtype, max_shard_bytes)
    for name in (TOKENIZER_NAME, VQ_WEIGHTS_NAME):
        if (trained.folder / name).is_file():
            shutil.copyfile(trained.folder / name, folder / name)
    checksums = "".join(f"{sha256_file(path)}  {path.name}\n" for path in sorted(folder.iterdir()))
    texts = {CHECKSUMS_NAME: checksums, "README.md": card, **bundled_files()}
    texts["generation_config.json"] = _json(generation_config(trained.description))
    if trained.description.images is None and trained.tokenizer_path.is_file():
        texts["tokenizer_config.json"] = _json(tokenizer_config(trained))
    texts[CONFIG_NAME] = _json(_config(trained, dtype))
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())


def _write_weights(folder: Path, trained: TrainedModel, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """One shard at a time, so that only one is held in another type."""
    parameters = {f"{PREFIX}{name}": p.detach() for name, p in trained.model.named_parameters()}
    sizes = {key: torch.empty_like(p, dtype=dtype, device="meta") for key, p in parameters.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    for name, keys in plan.filename_to_tensors.items():
        tensors = {key: parameters[key].to("cpu", dtype).contiguous() for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_NAME).write_bytes(_json(index).encode())


def _config(trained: TrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers asks for, and the description."""
    classes = {"AutoConfig": "PGMScaleConfig", "AutoModel": "PGMScaleModel"}
    if trained.description.model.kind == "autoregressive_transformer":
        classes["AutoModelForCausalLM"] = "PGMScaleForCausalLM"
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["PGMScaleModel"],
        "auto_map": {auto: f"{ENTRY_NAME}.{name}" for auto, name in classes.items()},
        "torch_dtype": str(dtype).removeprefix("torch."),
        VERSION_KEY: __version__,
        "description": configuration.to_mapping(trained.description),
    }


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
