"""From fragments of any layout to the ranges that any other layout asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pgm_scale.checkpoint.fragments import Piece, TensorKey, list_pieces
from pgm_scale.checkpoint.geometry import Box, Region, first_fault, grid_stride
from pgm_scale.errors import UserError
from pgm_scale.tensor_slices import TensorSlice

Range = tuple[TensorSlice, int, int]  # a shard; start and length in the flattened shard, in elements
Wanted = Mapping[TensorKey, tuple[tuple[int, ...], Sequence[Range]]]  # whole shape, ranges


@dataclass(frozen=True)
class Index:
    """Shape and stored pieces of every tensor of a checkpoint step; the pieces cover each tensor exactly once."""

    shapes: dict[TensorKey, tuple[int, ...]]
    pieces: dict[TensorKey, list[Piece]]


def build_index(paths: Iterable[Path]) -> Index:
    """Read the headers of all rank files and check that the pieces cover every tensor exactly once.

    Raises:
        UserError: one line for each tensor with a hole, an overlap or contradictory shapes.
    """
    shapes: dict[TensorKey, tuple[int, ...]] = {}
    pieces: dict[TensorKey, list[Piece]] = {}
    problems: list[str] = []
    for path in paths:
        for key, piece in list_pieces(path):
            shape = piece.slice.global_shape
            if shapes.setdefault(key, shape) == shape:
                pieces.setdefault(key, []).append(piece)
            else:
                problems.append(f"{_text(key)}: shape {shape} in {path.name}, {shapes[key]} in another file")
    problems += [
        problem
        for key, stored in pieces.items()
        if (problem := _coverage_problem(key, shapes[key], stored)) is not None
    ]
    _refuse(problems, "the stored fragments do not make whole tensors")
    return Index(shapes, pieces)


def _coverage_problem(key: TensorKey, shape: tuple[int, ...], stored: list[Piece]) -> str | None:
    """The first hole or overlap in a tensor."""
    stride = _grid_stride(key, shape, (piece.slice for piece in stored))
    boxes = [list(_region(piece, stride).boxes()) for piece in stored]
    fault = first_fault(itertools.chain(*boxes), math.prod(shape) // max(stride, 1), stride)
    if fault is None:
        return None
    low = fault.box.top * stride + fault.box.left
    place = f"elements {low} to {low + fault.box.right - fault.box.left}"
    if fault.missing:
        return f"{_text(key)}: nothing stored for {place}"
    owners = {
        piece.path.name
        for piece, own in zip(stored, boxes, strict=True)
        if any(fault.box.common(box) for box in own)
    }
    return f"{_text(key)}: stored twice: {place} (in {', '.join(sorted(owners))})"


def _region(piece: Piece, stride: int) -> Region:
    return Region.of(piece.slice, piece.start, piece.length, stride)


def _grid_stride(key: TensorKey, shape: tuple[int, ...], slices: Iterable[TensorSlice]) -> int:
    try:
        return grid_stride(shape, slices)
    except ValueError as error:
        raise UserError(
            f"{_text(key)}: {error}, which cannot be combined; load it with the version of pgm-scale that wrote it"
        ) from None


def check_names(index: Index, wanted: Wanted) -> None:
    """Refuse a checkpoint whose tensors are not exactly the wanted ones, for each kind that is wanted.

    Raises:
        UserError: one line for each missing, extra or mis-shaped tensor.
    """
    problems = []
    for key, (shape, _) in wanted.items():
        if key not in index.shapes:
            problems.append(f"{_text(key)}: missing in the checkpoint")
        elif index.shapes[key] != tuple(shape):
            problems.append(f"{_text(key)}: shape {index.shapes[key]} stored, the model has {tuple(shape)}")
    kinds = {kind for kind, _ in wanted}
    problems += [
        f"{_text(key)}: in the checkpoint, not in the model"
        for key in index.shapes
        if key[0] in kinds and key not in wanted
    ]
    _refuse(
        problems, "the checkpoint does not fit the model; load it with the model config it was saved with"
    )


def assemble(
    index: Index, wanted: Wanted, progress: Callable[[str], None] = lambda _: None
) -> dict[TensorKey, list[torch.Tensor]]:
    """Fill every wanted range from the stored pieces, whatever shards they are of.

    A file is opened once and mapped, so only the parts that are needed are read; the memory in use is what is
    returned.

    Returns:
        for each key one 1-D fp32 CPU tensor a range, in the order asked.

    Raises:
        UserError: a tensor's stored and wanted shards are cut in two ways, or a file is gone.
    """
    values = {
        key: [torch.empty(n, dtype=torch.float32) for _, _, n in ranges]
        for key, (_, ranges) in wanted.items()
    }
    copies: dict[Path, list[_Copy]] = {}
    for key, (shape, ranges) in wanted.items():
        for range_, target in zip(ranges, values[key], strict=True):
            for copy in _copies(key, shape, range_, target, index.pieces[key]):
                copies.setdefault(copy.piece.path, []).append(copy)
    for path, parts in copies.items():
        try:
            with safe_open(path, framework="pt") as file:
                for copy in parts:
                    progress(f"reading {path.name}")
                    copy.target.copy_(copy.region.cut(file.get_slice(copy.piece.key), copy.box))
        except (OSError, RuntimeError, SafetensorError) as error:  # purged, since its header was read
            raise UserError(f"{path}: cannot be read any more ({error}); use another step") from None
    return values


@dataclass(frozen=True)
class _Copy:
    """A rectangle of a stored piece and the place `[rows, columns]` of its values in a wanted range."""

    piece: Piece
    region: Region
    box: Box
    target: torch.Tensor


def _copies(
    key: TensorKey, shape: tuple[int, ...], range_: Range, target: torch.Tensor, stored: list[Piece]
) -> Iterator[_Copy]:
    """What a wanted range has in common with each stored piece."""
    slice_, start, length = range_
    assert slice_.global_shape == tuple(shape), (key, slice_)
    assert 0 <= start <= start + length <= slice_.numel, (key, start, length)
    stride = _grid_stride(key, shape, (slice_, *(piece.slice for piece in stored)))
    wanted = Region.of(slice_, start, length, stride)
    wanted_boxes = list(wanted.boxes())
    for piece in stored:
        region = _region(piece, stride)
        for own, other in itertools.product(region.boxes(), wanted_boxes):
            box = own.common(other)
            if box is not None:
                yield _Copy(piece, region, box, wanted.cut(target, box))


def _text(key: TensorKey) -> str:
    return f"{key[0]} {key[1]}"


def _refuse(problems: list[str], summary: str) -> None:
    if problems:
        raise UserError(f"{summary} ({len(problems)} problem(s)):\n  " + "\n  ".join(problems))
