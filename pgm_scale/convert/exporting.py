"""A run or an exported folder to a published format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pgm_scale.convert.checkpoint import ForeignCheckpoint
from pgm_scale.convert.describing import own_words
from pgm_scale.convert.formats import FORMATS, Format, llamagen_vq
from pgm_scale.convert.keys import published_tensors
from pgm_scale.convert.layouts import read_checkpoint, weights_path_of, write_checkpoint
from pgm_scale.errors import UserError
from pgm_scale.files import check_writable, sha256_file
from pgm_scale.loading import load
from pgm_scale.model_folder import is_model_folder
from pgm_scale.run_folder import RunFolder
from pgm_scale.trained_model import TrainedModel, Weights
from pgm_scale.vq_tokenizer import VQTokenizer


@dataclass(frozen=True)
class WriteRequest:
    """Attributes:
    folder: a run or an exported one.
    weights: which fill a file that holds one set; a Lightning file of a run holds both. An exported folder has
        one set: "ema" takes what is there.
    """

    folder: str
    output: str
    format_name: str
    weights: Weights = "ema"


def write_published(request: WriteRequest, say: Callable[[str], None] = print) -> None:
    """Write a file or folder in a published format, and read it again.

    Raises:
        UserError: no model there, one that the format is not of, or a place that cannot be written.
    """
    output = Path(request.output)
    if request.format_name == llamagen_vq.NAME:
        _check_file(output)
        tensors = llamagen_vq.published_vq(VQTokenizer.load(request.folder))
        checkpoint = ForeignCheckpoint("vq", output, output, tensors)
        write_checkpoint(checkpoint)
    else:
        table_of = FORMATS[request.format_name]
        _check_output(table_of, output)
        checkpoint, decay = _checkpoint(request, table_of, output)
        write_checkpoint(checkpoint, decay)
    _read_again(checkpoint)
    step = "" if checkpoint.step is None else f", step {checkpoint.step:,}"
    count = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    say(f"parity: read again, all {len(checkpoint.tensors)} tensors are equal to the bit")
    say(
        f"{output}: {request.format_name}, {len(checkpoint.tensors)} tensors, {count:,} numbers{step}, SHA-256 "
        f"{sha256_file(checkpoint.weights_path)}"
    )


def _check_output(table_of: Format, output: Path) -> None:
    if table_of.layout != "hugging_face":
        _check_file(output)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--out {output} is not empty; {table_of.name} is a folder: give a new one")


def _check_file(output: Path) -> None:
    check_writable("--out", output)
    if output.exists():  # a checkpoint may be the only one
        raise UserError(f"--out {output} is there already; give a new file")


def _checkpoint(request: WriteRequest, table_of: Format, output: Path) -> tuple[ForeignCheckpoint, float]:
    """And the decay of its average."""
    trained = load(request.folder, weights=_weights(request, table_of))
    description = trained.description
    if not table_of.fits(description.model):
        fitting = [f.name for f in FORMATS.values() if f.fits(description.model)]
        raise UserError(
            f"{table_of.name} is no format of a {description.model.kind}; give --to "
            f"{' or '.join(fitting) or 'none'}"
        )
    checkpoint = ForeignCheckpoint(
        table_of.layout,
        output,
        weights_path_of(table_of.layout, output),
        published_tensors(table_of, trained.model, dict(trained.model.named_parameters())),
        hyper_parameters={**table_of.hyper_parameters(description), **own_words(description)},
        step=description.origin.step,
    )
    if table_of.layout != "lightning":
        return checkpoint, 0.0
    average, decay = _average(request, trained)
    return replace(checkpoint, average=average), decay


def _weights(request: WriteRequest, table_of: Format) -> Weights:
    """Those asked for; but a Lightning file of a run has both sets, the raw ones first."""
    has_both = table_of.layout == "lightning" and not is_model_folder(request.folder)
    return "weight" if has_both else request.weights


def _average(request: WriteRequest, trained: TrainedModel) -> tuple[list[torch.Tensor], float]:
    """Of a run its own average; of an exported folder the one set it has, which then is both."""
    if is_model_folder(request.folder):
        averaged, decay = trained, 0.0
    else:
        step = trained.description.origin.step
        averaged = load(request.folder, step=step, weights="ema")
        decay = RunFolder(request.folder).config().training.ema_decay
    return [p.detach().float().clone() for p in averaged.model.parameters()], decay


def _read_again(checkpoint: ForeignCheckpoint) -> None:
    """Raises: UserError: what was written is not what was meant."""
    written = read_checkpoint(checkpoint.path)
    pairs = [(written.tensors.get(key), tensor) for key, tensor in checkpoint.tensors.items()]
    pairs += zip(written.average or [], checkpoint.average or [], strict=True)
    if len(written.tensors) != len(checkpoint.tensors) or any(
        found is None or not torch.equal(_bits(found), _bits(tensor)) for found, tensor in pairs
    ):
        raise UserError(f"{checkpoint.path} does not hold what was written; is the disk all right?")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)
