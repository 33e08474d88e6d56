"""Whether a configuration, its data and its run folder fit together: what one process can tell."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.models import build_model
from pgm_scale.parallel.layout import length_problems
from pgm_scale.run_folder import RunFolder
from pgm_scale.training.content import content_problems


def setup_problems(config: RunConfig, splits: list[SplitStorage]) -> list[str]:
    """Lines for what of the data does not fit the configuration, and what is wrong with the run folder.

    Args:
        splits: those that could be opened, training first.
    """
    problems: list[str] = []
    if splits:
        problems += length_problems(config, splits[0].manifest.length_tokens)
        problems += content_problems(config, splits[0].manifest)
    return [*problems, *_folder_problems(config, splits)]


def existing_folder(folder: str | Path) -> Path:
    """The run folder, or, before it is made, the nearest folder above it that is there."""
    path = Path(folder).absolute()
    return next(above for above in (path, *path.parents) if above.exists())


def _folder_problems(config: RunConfig, splits: list[SplitStorage]) -> Iterator[str]:
    """Whether the run folder can be written, goes on with what is in it, and has room for the checkpoints."""
    folder, existing = Path(config.folder), existing_folder(config.folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"folder: {existing} cannot be written as a folder; choose another run folder"
        return
    if not splits:
        return
    manifest = splits[0].manifest
    if (folder / "run.json").exists():
        try:
            RunFolder(folder).check_continues(config, manifest)
        except UserError as error:
            yield str(error)
    with torch.device("meta"):
        model = build_model(config.model, manifest.vocabulary.size, manifest.length_tokens)
    # Weights, two moments and EMA in fp32; a new checkpoint is written before the oldest is deleted.
    needed_bytes = sum(p.numel() for p in model.parameters()) * 16 * (config.checkpoint.keep_last + 1)
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        yield (
            f"folder: {free_bytes / 2**30:.1f} GiB are free at {existing}, but {config.checkpoint.keep_last + 1} "
            f"checkpoints take {needed_bytes / 2**30:.1f} GiB; make room, or lower checkpoint.keep_last"
        )
