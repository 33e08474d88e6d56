"""An exported model: one folder that this package, transformers and people can read.

    <folder>/config.json                  what transformers looks for, and `description`: a `ModelDescription`
    <folder>/model.safetensors            the weights, published names behind `backbone.`; of large models
    <folder>/model.safetensors.index.json   and model-00001-of-0000N.safetensors instead
    <folder>/tokenizer.json               as the training data have it; of images vq.safetensors beside it
    <folder>/SHA256SUMS                   of these files but config.json; as `sha256sum -c` reads it
    <folder>/tokenizer_config.json        of text: for transformers.AutoTokenizer
    <folder>/generation_config.json       how it samples unless asked otherwise, in transformers' terms and in ours
    <folder>/modeling_pgm_scale.py        and pgm_scale_*.py: this package's models, for `trust_remote_code`
    <folder>/README.md                    the model card, for people

`pgm_scale.export` writes it. Reading takes torch, numpy, safetensors and pyyaml, neither deepspeed nor megatron.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pgm_scale import config as configuration
from pgm_scale.config import DataConfig, RunConfig
from pgm_scale.errors import UserError
from pgm_scale.files import check_regular, read_bounded, sha256_file
from pgm_scale.models import build_model
from pgm_scale.trained_model import ModelDescription, TrainedModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CHECKSUMS_NAME = "SHA256SUMS"
MODEL_TYPE = "pgm_scale"  # `model_type` of config.json
PREFIX = "backbone."  # of the weights' names, as in the published files
VERSION_KEY = "pgm_scale_version"  # of config.json: what wrote it
MAX_LENGTH_TOKENS = 1 << 20  # no weight's shape shows the length of text, so a garbled one is caught here
MAX_BLOCKS = 1 << 12  # a model is built, without memory for its weights, before its shapes are compared
MAX_SIZE = 1 << 28  # of the widths and counts of a model

_LONGEST_PROBLEM, _MOST_PROBLEMS = 500, 8
Shape = tuple[int, ...]
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def is_model_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG_NAME).is_file()


def read_description(folder: str | Path) -> ModelDescription:
    """What config.json says of the model.

    Raises:
        UserError: it is missing, garbled, or no exported model's.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        tree = json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}); give a folder of `pgm-scale export`") from None
    if not isinstance(tree, dict) or tree.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{path} is not of an exported model (no model_type {MODEL_TYPE}); use `pgm-scale export`"
        )
    version = tree.get(VERSION_KEY)
    writer = f" (of pgm-scale {version[:20]})" if isinstance(version, str) and version.isprintable() else ""
    return parse_description(tree.get("description"), f"{path}{writer}")


def parse_description(tree: Any, where: str) -> ModelDescription:
    """A description from plain containers; the values must go together as those of a run's configuration.

    Raises:
        UserError: `where` is damaged, and how.
    """
    description, problems = read_tree(tree)
    if description is not None:
        problems += grid_problems(description)
    if description is None or problems:
        told = "; ".join(problem[:_LONGEST_PROBLEM] for problem in problems[:_MOST_PROBLEMS])
        raise UserError(
            f"{where} is damaged: {told}; export the model again, or use the release that wrote it"
        )
    return description


def read_tree(tree: Any) -> tuple[ModelDescription | None, list[str]]:
    """A description from plain containers, and what is wrong with it."""
    problems: list[str] = []
    description = configuration.parse(ModelDescription, tree, problems, "description")
    return description, problems or _inconsistencies(description)


def _inconsistencies(description: ModelDescription) -> list[str]:
    run = RunConfig(
        "",
        DataConfig("", ""),
        model=description.model,
        objective=description.objective,
        sampler=description.sampler,
    )
    vocabulary, problems = description.vocabulary, configuration.inconsistencies(run)
    ids = (vocabulary.mask_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id or 0)
    if not all(0 <= token < vocabulary.size for token in ids):
        problems.append(f"vocabulary: an id is not below the size {vocabulary.size}")
    if not 1 <= description.length_tokens <= MAX_LENGTH_TOKENS:
        problems.append(f"length_tokens: {description.length_tokens} must be from 1 to {MAX_LENGTH_TOKENS}")
    sizes = {f"model.{name}": value for name, value in vars(description.model).items() if type(value) is int}
    for name, value in {**sizes, "vocabulary.size": vocabulary.size}.items():
        most = MAX_BLOCKS if name.endswith("_blocks") else MAX_SIZE
        if value > most:
            problems.append(f"{name}: {value} is more than {most}")
    return problems


def grid_problems(description: ModelDescription) -> list[str]:
    """Whether rows of codes are as long as their grid tells."""
    images, length = description.images, description.length_tokens
    if images is None or images.tokens != "codes" or images.grid_side**2 == length - 1:
        return []
    return [f"length_tokens: {length} is not BOS and a grid of {images.grid_side} a side"]


def load_folder(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TrainedModel:
    """The model of an exported folder; on the host it takes the memory of its fp32 weights once.

    Raises:
        UserError: no such folder, a damaged one, or one whose weights do not fit its description.
    """
    folder = Path(folder)
    description = read_description(folder)
    size, length = description.vocabulary.size, description.length_tokens
    with torch.device("meta"):
        expected = _shapes(build_model(description.model, size, length))
    # Before any memory is taken for a model that the weights are not of.
    check_shapes(expected, _stored_shapes(folder), str(folder))
    check_files(folder)
    model = build_model(description.model, size, length)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _stored_tensors(folder):
            parameters[name].copy_(tensor)
    model.eval().requires_grad_(False)
    return TrainedModel(model.to(device, dtype), description, folder)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of an exported folder, by the model's own names, in the type that they are stored in.

    Raises:
        UserError: a file is missing, damaged, or holds something else.
    """
    folder = Path(folder)
    _stored_shapes(folder)
    check_files(folder)
    return dict(_stored_tensors(folder))


def check_files(folder: Path) -> None:
    """Compare files with SHA256SUMS, if it is there: other programs that write such folders leave it out.

    Raises:
        UserError: names the first file that is missing or has other bytes.
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return
    try:
        lines = read_bounded(path).decode().splitlines()
        for line in lines:
            match = _CHECKSUM_LINE.fullmatch(line)
            if match is None:
                raise UserError(f"{path} is damaged: {line[:80]!r}; copy or export the folder again")
            checksum, name = match.groups()
            if sha256_file(folder / name) != checksum:
                raise UserError(
                    f"{folder / name} is damaged: its bytes are not those of {CHECKSUMS_NAME}; "
                    "copy or export the folder again"
                )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder}: {error}; copy or export the folder again") from None


def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill every parameter of a model.

    Raises:
        UserError: one line for each name that is missing, unknown, or of another shape.
    """
    check_shapes(_shapes(model), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Raises: UserError: one line for each name that is missing, unknown, or of another shape."""
    problems = [
        f"{name}: {_difference(expected.get(name), found.get(name))}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if problems:
        raise UserError(f"{where} does not fit the model:\n  " + "\n  ".join(problems))


def _difference(expected: Shape | None, found: Shape | None) -> str:
    if found is None:
        return f"missing, the model has {expected}"
    return "unknown to the model" if expected is None else f"shape {found}, the model has {expected}"


def _stored_shapes(folder: Path) -> dict[str, Shape]:
    """From the files' headers."""
    shapes: dict[str, Shape] = {}
    for path in _weight_files(folder):
        with _opened(path) as stored:
            for key in stored.keys():  # noqa: SIM118
                name = key.removeprefix(PREFIX)
                if name == key or name in shapes:
                    problem = (
                        f"{key} does not start with {PREFIX}" if name == key else f"{key} is stored twice"
                    )
                    raise UserError(f"{path}: {problem}; export the model again")
                shapes[name] = tuple(stored.get_slice(key).get_shape())
    return shapes


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """One at a time, mapped from its file."""
    for path in _weight_files(folder):
        with _opened(path) as stored:
            for key in stored.keys():  # noqa: SIM118
                yield key.removeprefix(PREFIX), stored.get_tensor(key)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; copy or export the folder again") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if not index.is_file():
        return [folder / WEIGHTS_NAME]
    try:
        names = sorted(set(json.loads(read_bounded(index))["weight_map"].values()))
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError("file names expected")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({error}); copy or export the folder again") from None
    return [folder / name for name in names]
