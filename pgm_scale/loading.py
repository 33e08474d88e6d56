"""One way to a trained model, whether it lies in a run folder or in an exported one."""

from __future__ import annotations

from pathlib import Path

import torch

from pgm_scale.config import VQModelConfig
from pgm_scale.data.manifest import ImageContent
from pgm_scale.errors import UserError
from pgm_scale.model_folder import is_model_folder, load_folder, read_description
from pgm_scale.run_folder import RunFolder, load_run
from pgm_scale.trained_model import Origin, TrainedModel, Weights

# What int8 may change: the root mean square of the logits' differences over the logits' standard deviation. On the
# three trained models of the demos it was 0.2 to 0.4% (bf16: 0.4 to 0.6%), at 1e-5 to 9e-5 nats of KL a token; the
# bound leaves room for deeper models, and lies where the KL, which grows with the square, would be some 0.002.
INT8_BOUND = 0.02


def load(
    folder: str | Path,
    *,
    step: int | None = None,
    weights: Weights = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
) -> TrainedModel:
    """The model of a run (its newest good checkpoint, or that of `step`) or of an exported folder.

    Args:
        int8: keep the weights of the blocks' linears as signed bytes (`models.int8`).

    Raises:
        UserError: neither of them, a damaged one, a step or raw weights asked of an exported folder, or logits that
            int8 changes by more than `INT8_BOUND`.
    """
    if not Path(folder).exists():
        raise UserError(f"{folder}: no such folder; give the folder of a run or of an exported model")
    if is_model_folder(folder):
        trained = load_folder(folder, device=device, dtype=dtype)
        check_origin(folder, trained.description.origin, step, weights)
    else:
        trained = load_run(folder, step=step, weights=weights, device=device, dtype=dtype)
    if int8:
        _quantize(folder, trained)
    return trained


def check_origin(folder: str | Path, origin: Origin, step: int | None, weights: Weights) -> None:
    """Raises: UserError: an exported folder of `origin` is asked for another step, or weights that it has not."""
    if step not in (None, origin.step):
        raise UserError(f"{folder} is the export of step {origin.step}; leave out the step, or give the run")
    if weights != "ema" and weights != origin.weights:
        raise UserError(
            f"{folder} holds {origin.weights_name} weights only; give the run, or leave out --weights"
        )


def _quantize(folder: str | Path, trained: TrainedModel) -> None:
    from pgm_scale.export.parity import LogitDifference, probe_logits
    from pgm_scale.models.int8 import quantize_blocks

    if isinstance(trained.description.model, VQModelConfig):
        raise UserError(
            f"{folder} is a VQ tokenizer, whose convolutions have no int8 form; load it without int8"
        )
    expected = probe_logits(trained)
    quantize_blocks(trained.model)
    difference = LogitDifference.of(expected, probe_logits(trained))
    if not difference.relative_rms <= INT8_BOUND:  # so written, NaN fails
        raise UserError(
            f"{folder}: int8 weights change the logits by {difference.relative_rms:.2%} of their spread, more than "
            f"the {INT8_BOUND:.0%} that are allowed; load it without int8"
        )


def read_images(folder: str | Path) -> ImageContent | None:
    """What the rows of a run or an exported model are, without loading the weights; None is text."""
    if is_model_folder(folder):
        return read_description(folder).images
    run = RunFolder(folder)
    run.config()  # which says it best, if this is no run
    return run.identity().images
