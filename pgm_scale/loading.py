"""One way to a trained model, whether it lies in a run folder or in an exported one."""

from __future__ import annotations

from pathlib import Path

import torch

from pgm_scale.data.manifest import ImageContent
from pgm_scale.errors import UserError
from pgm_scale.model_folder import is_model_folder, load_folder, read_description
from pgm_scale.run_folder import RunFolder, load_run
from pgm_scale.trained_model import TrainedModel, Weights


def load(
    folder: str | Path,
    *,
    step: int | None = None,
    weights: Weights = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TrainedModel:
    """The model of a run (its newest good checkpoint, or that of `step`) or of an exported folder.

    Raises:
        UserError: neither of them, a damaged one, or a step or raw weights asked of an exported folder.
    """
    if not is_model_folder(folder):
        return load_run(folder, step=step, weights=weights, device=device, dtype=dtype)
    trained = load_folder(folder, device=device, dtype=dtype)
    origin = trained.description.origin
    if step not in (None, origin.step):
        raise UserError(f"{folder} is the export of step {origin.step}; leave out the step, or give the run")
    if weights != "ema" and weights != origin.weights:
        raise UserError(f"{folder} holds {origin.weights} weights only; give the run, or leave out --weights")
    return trained


def read_images(folder: str | Path) -> ImageContent | None:
    """What the rows of a run or an exported model are, without loading the weights; None is text."""
    if is_model_folder(folder):
        return read_description(folder).images
    run = RunFolder(folder)
    run.config()  # which says it best, if this is no run
    return run.identity().images
