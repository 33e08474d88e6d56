"""Fragments: what one rank owns of the model and optimizer, and the format of the file they are in.

A fragment is a flat range of a tensor-parallel shard, and the shard is a slice of a whole tensor, so a file says
nothing of the layout that wrote it. The file is plain safetensors. Each tensor in it is 1-D fp32; its key is

    <kind>/<name>@<start>                           of a whole tensor
    <kind>/<name>@<offset>:<run>:<stride>@<start>   of a shard, see `TensorSlice`

with all numbers in elements. The metadata holds the format's version and the whole tensors' shapes. Version 1
knew whole tensors only; readers refuse a version they do not know.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError, safe_open

from pgm_scale.errors import UserError
from pgm_scale.tensor_slices import TensorSlice

assert sys.byteorder == "little", "values are written as they lie in memory"

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TensorKey = tuple[Kind, str]  # kind and parameter name
FORMAT = "pgm-scale fragments 2"
READABLE_FORMATS = ("pgm-scale fragments 1", FORMAT)
_KEY = re.compile(r"(\w+)/(.*?)(?:@(\d+):(\d+):(\d+))?@(\d+)", re.DOTALL)


@dataclass(frozen=True)
class Fragment:
    """The flat range [start, start + len(values)) of a shard of the tensor `name`, flattened row-major.

    Args:
        name: the parameter's name in the whole model.
        slice: the shard's place in the whole tensor; `TensorSlice.whole` of one that is not sharded.
        start: offset of the range in the flattened shard, in elements.
        values: 1-D fp32 on any device; may be empty. It is not copied: it must not change while it is saved.
    """

    name: str
    slice: TensorSlice
    start: int
    values: torch.Tensor

    def __post_init__(self) -> None:
        assert self.values.dtype == torch.float32, (self.name, self.values.dtype)
        assert self.values.dim() == 1, (self.name, self.values.shape)
        assert 0 <= self.start <= self.slice.numel - len(self.values), self.name

    def key(self, kind: Kind) -> str:
        """Its key in a file."""
        place = "" if self.slice.is_whole else f"@{self.slice.offset}:{self.slice.run}:{self.slice.stride}"
        return f"{kind}/{self.name}{place}@{self.start}"


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint step, as the manifest lists it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """A stored fragment: `length` elements of a shard from `start` on, under `key` in the file `path`."""

    path: Path
    key: str
    slice: TensorSlice
    start: int
    length: int


def file_header(owned: Sequence[tuple[Kind, Fragment]]) -> bytes:
    """What a file begins with: the length of its description, and that; the values follow in the same order."""
    shapes = {fragment.name: list(fragment.slice.global_shape) for _, fragment in owned}
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "shapes": json.dumps(shapes)}}
    end = 0
    for kind, fragment in owned:
        key = fragment.key(kind)
        assert kind in KINDS, kind
        assert _split_key(key)[:2] == (kind, fragment.name), f"{key}: its name reads as a slice"
        assert key not in header, f"two fragments of {key} on one rank"
        begin, end = end, end + 4 * len(fragment.values)
        header[key] = {"dtype": "F32", "shape": [len(fragment.values)], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the values to 8 bytes
    return len(text).to_bytes(8, "little") + text


def list_pieces(path: Path) -> list[tuple[TensorKey, Piece]]:
    """Kind and name, and place, of every fragment in a file; reads its header only.

    Raises:
        UserError: the file is no safetensors file of ours, or of a version that is not known here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in READABLE_FORMATS:
                raise UserError(
                    f"{path}: its format is {metadata.get('format')!r}, this version reads {READABLE_FORMATS}; "
                    "load it with the version of pgm-scale that wrote it"
                )
            shapes = _shapes(json.loads(metadata["shapes"]))
            return [_piece(path, key, file.get_slice(key), shapes) for key in file.keys()]  # noqa: SIM118
    # RuntimeError: a file that has just gone. The last four: a crafted header; TensorSlice asserts.
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AssertionError,
    ) as error:
        raise UserError(f"{path}: not a readable fragment file ({error}); use another step") from None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The whole tensors' shapes, of a file's metadata."""
    if not isinstance(tree, dict):
        raise ValueError("its shapes are no mapping")
    for name, shape in tree.items():
        if not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
            raise ValueError(f"{name!r} has no shape of a tensor")
    return {name: tuple(shape) for name, shape in tree.items()}


def _piece(path: Path, key: str, stored: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[TensorKey, Piece]:
    """`stored`: safetensors' view of the tensor."""
    kind, name, place, start = _split_key(key)
    if stored.get_dtype() != "F32":
        raise ValueError(f"{key!r} is {stored.get_dtype()}, not F32")
    whole = TensorSlice.whole(shapes[name])
    slice_ = TensorSlice(whole.global_shape, *place) if place else whole
    [length] = stored.get_shape()
    if start + length > slice_.numel:
        raise ValueError(f"{key!r} ends outside of its tensor")
    return (cast(Kind, kind), name), Piece(path, key, slice_, start, length)


def _split_key(key: str) -> tuple[str, str, list[int], int]:
    """Kind, name, (offset, run, stride) or nothing, start."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"the key {key!r} is none of ours")
    kind, name, *place, start = match.groups()
    return kind, name, [int(number) for number in place if number is not None], int(start)
