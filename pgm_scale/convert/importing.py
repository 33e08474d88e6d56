"""A foreign checkpoint to an exported folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgm_scale.convert.checkpoint import ForeignCheckpoint
from pgm_scale.convert.describing import describe
from pgm_scale.convert.formats import FORMATS, Format, llamagen_vq
from pgm_scale.convert.formats.base import Contents
from pgm_scale.convert.keys import bare_tensors, weights_by_name
from pgm_scale.convert.layouts import read_checkpoint
from pgm_scale.convert.tokenizers import Companion, companion
from pgm_scale.errors import UserError
from pgm_scale.export.folder import check_free, write_model_folder
from pgm_scale.export.parity import ROWS, LogitDifference, probe_logits
from pgm_scale.files import sha256_file
from pgm_scale.model_folder import MODEL_TYPE, load_folder
from pgm_scale.models import build_model
from pgm_scale.trained_model import ModelDescription, Origin, TrainedModel, Weights

_MOST_LENGTH_TOKENS = 1 << 17  # position tables are computed for it


@dataclass(frozen=True)
class ImportRequest:
    """Attributes:
    format_name: None to tell it from the content.
    weights: the EMA, where there is one, or the raw weights.
    tokenizer: a tokenizer.json, or of image models a VQ tokenizer.
    settings: `key=value` over what the file says, as `model.num_heads=16 length_tokens=128`.
    strict: unknown keys are errors.
    """

    source: str
    output: str
    format_name: str | None = None
    weights: Weights = "ema"
    tokenizer: str | None = None
    settings: Sequence[str] = ()
    strict: bool = True


def import_checkpoint(request: ImportRequest, say: Callable[[str], None] = print) -> None:
    """Write the folder, and say how far its logits are from those of the foreign tensors.

    Raises:
        UserError: no such file, a damaged one, an unknown format, or keys that do not fit: all of them are listed.
    """
    output = Path(request.output)
    check_free(output)
    checkpoint = read_checkpoint(request.source)
    sha256 = sha256_file(checkpoint.weights_path)
    if checkpoint.layout == "vq":
        llamagen_vq.import_vq(checkpoint, request.format_name, request.weights, output)
        say(f"{output}: VQ tokenizer of {checkpoint.path.name}{_step(checkpoint)}, SHA-256 {sha256}")
        return
    table_of = chosen_format(checkpoint, request.format_name)
    use_average = request.weights == "ema" and checkpoint.average is not None
    if request.weights == "ema" and not use_average:
        say(f"{checkpoint.path.name} has no averaged weights: these are the raw ones")
    origin = Origin(
        source=f"{checkpoint.path.name} ({table_of.name})",
        run_id=None,
        step=checkpoint.step,
        weights="ema" if use_average else "weight",
        checkpoint_sha256=sha256,
    )
    contents = _contents(checkpoint, table_of)
    with tempfile.TemporaryDirectory() as beside:
        given = companion(request.tokenizer, checkpoint, contents.images is not None, Path(beside))
        description = describe(contents, checkpoint.hyper_parameters, origin, given, request.settings)
        weights, unknown = weights_by_name(
            checkpoint, table_of, _on_meta(description), use_average, request.strict
        )
        for line in unknown:
            say(f"left out: {line}")
        trained = TrainedModel(_filled(description, weights), description, Path(beside))
        expected = probe_logits(trained)
        write_model_folder(
            output,
            trained,
            _card(trained, given),
            check=lambda folder: _report(folder, expected, say),
        )
    count = sum(tensor.numel() for tensor in weights.values())
    say(
        f"{output}: {len(weights)} tensors, {count:,} parameters, {origin.weights_name} weights of {origin.source}"
        f"{_step(checkpoint)}, SHA-256 {sha256}"
    )
    vocabulary = description.vocabulary
    say(
        f"length {description.length_tokens}, mask {vocabulary.mask_id}, BOS {vocabulary.bos_id}, EOS "
        f"{vocabulary.eos_id}; if the model was trained with others, convert again with --set"
    )
    if given.name is None:
        say("there is no tokenizer in it; give one with --tokenizer to sample from the folder")


def chosen_format(checkpoint: ForeignCheckpoint, name: str | None) -> Format:
    """The format asked for, or the one that its keys tell.

    Raises:
        UserError: it is none, or not the one asked for.
    """
    keys = bare_tensors(checkpoint)
    candidates = [known for known in FORMATS.values() if known.has(checkpoint.layout, keys)]
    fitting = [known for known in candidates if known.is_told_by(checkpoint.hyper_parameters)]
    if name is None and fitting:
        return fitting[0]
    for known in candidates:
        if known.name == name:
            return known
    if fitting:
        raise UserError(f"{checkpoint.path} is not {name} but {fitting[0].name}; leave out --from")
    if checkpoint.hyper_parameters.get("model_type") == MODEL_TYPE:
        raise UserError(f"{checkpoint.path} is an exported folder already; give --to FORMAT to convert it")
    some = ", ".join(key[:60] for key in list(checkpoint.tensors)[:5])
    raise UserError(
        f"{checkpoint.path} is of none of the formats {', '.join([*FORMATS, llamagen_vq.NAME])}: its tensors are "
        f"{some}; give a published checkpoint, or --from"
    )


def _contents(checkpoint: ForeignCheckpoint, table_of: Format) -> Contents:
    shapes = {name: tuple(tensor.shape) for name, tensor in bare_tensors(checkpoint).items()}
    try:
        return table_of.describe(shapes, checkpoint.hyper_parameters)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None


def _on_meta(description: ModelDescription) -> nn.Module:
    if description.length_tokens > _MOST_LENGTH_TOKENS:
        raise UserError(
            f"length_tokens {description.length_tokens} is more than {_MOST_LENGTH_TOKENS}; set it (--set)"
        )
    with torch.device("meta"):
        return build_model(description.model, description.vocabulary.size, description.length_tokens)


def _filled(description: ModelDescription, weights: dict[str, Tensor]) -> nn.Module:
    model = build_model(description.model, description.vocabulary.size, description.length_tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval().requires_grad_(False)


def _report(folder: Path, expected: Tensor, say: Callable[[str], None]) -> None:
    """The folder, read again, must be the model of the foreign tensors, to the bit."""
    difference = LogitDifference.of(expected, probe_logits(load_folder(folder)))
    if not difference.max_absolute == 0:  # so written, NaN fails
        raise UserError(
            f"the folder's logits differ from the checkpoint's by {difference.max_absolute:.2g}; nothing was "
            "written: its weights may not be finite"
        )
    say(
        f"parity: largest logit difference {difference.max_absolute:.3g} between the model of the foreign tensors "
        f"and the folder read again, of a spread of {difference.spread:.3g} ({ROWS} rows of random tokens)"
    )


def _step(checkpoint: ForeignCheckpoint) -> str:
    return "" if checkpoint.step is None else f", step {checkpoint.step:,}"


def _card(trained: TrainedModel, given: Companion) -> str:
    description, origin = trained.description, trained.description.origin
    count = sum(p.numel() for p in trained.model.parameters())
    rows: dict[str, Any] = {
        "converted from": origin.source,
        "SHA-256 of its weights": origin.checkpoint_sha256,
        "weights": origin.weights_name,
        "step": "not known" if origin.step is None else origin.step,
        "parameters": f"{count:,}",
        "tokens a row": description.length_tokens,
        "vocabulary": description.vocabulary.size,
        "tokenizer": given.name or "none",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\ntags:\n- pgm-scale\n---\n\n"
        f"# {origin.source}\n\nA {description.model.kind}, converted by `pgm-scale convert`; load it with "
        f"`pgm_scale.load`. The license is that of the original.\n\n| | |\n|---|---|\n{table}\n"
    )
