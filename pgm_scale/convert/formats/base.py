"""What a format of foreign checkpoints is: how it is told, its keys, and what it says of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgm_scale.config import ModelConfig, ObjectiveConfig, SamplerConfig
from pgm_scale.convert.checkpoint import HyperParameters, Layout, found
from pgm_scale.data.manifest import ImageContent, Vocabulary
from pgm_scale.errors import UserError
from pgm_scale.models.layers import FREQUENCY_BASE
from pgm_scale.trained_model import ModelDescription

Shapes = Mapping[str, tuple[int, ...]]  # by keys without prefix
HEAD_SIZE = 64  # of all published models but a few, which say so
_TEXT_LENGTH_TOKENS = 1024
_DROPOUT = 0.1
_WRAPPERS = {"_orig_mod", "module"}  # which torch.compile and DistributedDataParallel put around a model
PREFIX = "backbone."


@dataclass(frozen=True)
class Contents:
    """What tensors and hyper-parameters say of a model; `ModelDescription` has the same fields."""

    model: ModelConfig
    objective: ObjectiveConfig
    sampler: SamplerConfig
    vocabulary: Vocabulary
    length_tokens: int
    images: ImageContent | None = None


@dataclass(frozen=True)
class DerivedKey:
    """A published key that holds nothing of its own: checked on the way in, made again on the way out.

    Attributes:
        after: our key that it follows in the published order.
        value: of the model and its tensors.
        tolerance: relative, 0 for equal bits.
    """

    key: str
    after: str
    value: Callable[[ModelConfig, Mapping[str, Tensor]], Tensor]
    tolerance: float = 0.0


@dataclass(frozen=True)
class Format:
    """One published format. Its table of keys is ours behind `prefix`, and `derived`: see `published_keys`.

    Attributes:
        marks: keys, without prefix, that every file has.
        not_marks: keys that no file has.
        is_told_by: of the hyper-parameters, where keys do not tell formats apart.
        describe: shapes and hyper-parameters to contents.
        fits: whether a model can be written so.
        hyper_parameters: what is written beside the tensors.
    """

    name: str
    layout: Layout
    prefix: str
    marks: tuple[str, ...]
    not_marks: tuple[str, ...]
    describe: Callable[[Shapes, HyperParameters], Contents]
    fits: Callable[[ModelConfig], bool]
    hyper_parameters: Callable[[ModelDescription], HyperParameters]
    derived: tuple[DerivedKey, ...] = ()
    is_told_by: Callable[[HyperParameters], bool] = lambda _: True

    def has(self, layout: Layout, keys: Mapping[str, Any]) -> bool:
        """Whether layout and keys are of this format."""
        is_whole = all(mark in keys for mark in self.marks)
        return layout == self.layout and is_whole and not any(mark in keys for mark in self.not_marks)

    def published_keys(self, names: list[str]) -> dict[str, str | DerivedKey]:
        """The table: every published key, in its order, to ours of `names`, or to how it is derived."""
        table: dict[str, str | DerivedKey] = {}
        for name in names:
            table[self.prefix + name] = name
            for derived in self.derived:
                if derived.after == name:
                    table[self.prefix + derived.key] = derived
        return table


def bare_key(key: str) -> str:
    """A key as our models have it: without wrappers, and without the prefix, which may be there twice."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def shape_of(shapes: Shapes, key: str, dimensions: int) -> tuple[int, ...]:
    """Raises: UserError: no such tensor, or of another number of dimensions, or empty."""
    shape = shapes.get(key)
    if shape is None or len(shape) != dimensions or 0 in shape:
        what = "is missing" if shape is None else f"has shape {shape}"
        raise UserError(f"{key}, which tells the size of the model, {what}; give a published checkpoint")
    return shape


def numbered(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow the prefix in keys `<prefix><number>.<rest>`."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)}
    return len({number for number in numbers if number.isdecimal()})


def rotary_heads(shapes: Shapes, hidden_size: int) -> int:
    """By RoPE's frequencies, of which there is one for two dimensions of a head."""
    frequencies = shapes.get("rotary_emb.inv_freq", (HEAD_SIZE // 2,))
    head_size = 2 * frequencies[0] if frequencies and frequencies[0] else HEAD_SIZE
    return max(1, hidden_size // head_size)


def inverse_frequencies(model: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """`rotary_emb.inv_freq` in fp32, by the published formula and in its order of operations (FACTS 1.4)."""
    size = model.hidden_size // model.num_heads
    return 1.0 / (FREQUENCY_BASE ** (torch.arange(0, size, 2).float() / size))


def rotary_key(after: str) -> DerivedKey:
    return DerivedKey("rotary_emb.inv_freq", after, inverse_frequencies, tolerance=1e-5)


def dropout(hyper_parameters: HyperParameters) -> float:
    said: float | None = found(hyper_parameters, ("dropout",), float)
    return _DROPOUT if said is None else said


def text_length_tokens(hyper_parameters: HyperParameters) -> int:
    return found(hyper_parameters, ("length", "model_length"), int) or _TEXT_LENGTH_TOKENS


def text_vocabulary(size: int) -> Vocabulary:
    """The ids of FACTS 1.7 by the number of rows: BERT's, or else, as GPT-2's, the mask last and BOS before it."""
    if size == 30_522:
        return Vocabulary(size, mask_id=103, bos_id=101, eos_id=102, pad_id=0)
    return Vocabulary(size, mask_id=size - 1, bos_id=max(0, size - 2), eos_id=max(0, size - 2), pad_id=None)


def code_vocabulary(size: int) -> Vocabulary:
    """Of VQ codes, with mask and BOS behind them (FACTS 2.1)."""
    return Vocabulary(size, mask_id=max(0, size - 2), bos_id=size - 1, eos_id=size - 1, pad_id=None)


def code_images(length_tokens: int, num_classes: int, downsampling: int) -> ImageContent:
    """Square RGB images of BOS and a grid of codes, whose classes have numbers for names."""
    side = round((length_tokens - 1) ** 0.5)
    names = tuple(str(number) for number in range(num_classes))
    return ImageContent("codes", side * downsampling, 3, side, names)
