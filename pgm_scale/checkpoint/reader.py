"""From fragments of any layout to the ranges that any other layout asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from pgm_scale.checkpoint.fragments import Piece, TensorKey, list_pieces
from pgm_scale.errors import UserError

Range = tuple[int, int]  # start and length in the flattened whole tensor, in elements
Wanted = Mapping[TensorKey, tuple[tuple[int, ...], Sequence[Range]]]  # whole shape, ranges


@dataclass(frozen=True)
class Index:
    """Shape and stored pieces, ordered by start, of every tensor of a checkpoint step."""

    shapes: dict[TensorKey, tuple[int, ...]]
    pieces: dict[TensorKey, list[Piece]]


def build_index(paths: Iterable[Path]) -> Index:
    """Read the headers of all rank files and check that the pieces cover every tensor exactly once.

    Raises:
        UserError: one line for each hole, overlap or contradiction in shape.
    """
    shapes: dict[TensorKey, tuple[int, ...]] = {}
    pieces: dict[TensorKey, list[Piece]] = {}
    problems: list[str] = []
    for path in paths:
        for key, shape, piece in list_pieces(path):
            if shapes.setdefault(key, shape) != shape:
                problems.append(f"{_text(key)}: shape {shape} in {path.name}, {shapes[key]} in another file")
            pieces.setdefault(key, []).append(piece)
    for key, stored in pieces.items():
        stored.sort(key=lambda piece: (piece.start, piece.length))
        problems += _coverage_problems(key, math.prod(shapes[key]), stored)
    _refuse(problems, "the stored fragments do not make whole tensors")
    return Index(shapes, pieces)


def _coverage_problems(key: TensorKey, size: int, stored: list[Piece]) -> list[str]:
    problems, end = [], 0
    for piece in stored:
        if piece.start != end:
            fault = "nothing stored for" if piece.start > end else "stored twice:"
            low, high = sorted((piece.start, end))
            problems.append(f"{_text(key)}: {fault} elements {low} to {high} (at {piece.path.name})")
        end = max(end, piece.start + piece.length)
    if end != size:
        problems.append(f"{_text(key)}: {end} elements stored, the tensor has {size}")
    return problems


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


def assemble(index: Index, wanted: Wanted) -> dict[TensorKey, list[torch.Tensor]]:
    """Fill every wanted range from the stored pieces; a file is opened once, and only needed parts are read.

    Returns:
        for each key one 1-D fp32 CPU tensor a range, in the order asked.
    """
    values: dict[TensorKey, list[torch.Tensor]] = {}
    copies: dict[Path, list[tuple[Piece, int, int, torch.Tensor]]] = {}
    for key, (shape, ranges) in wanted.items():
        values[key] = []
        for start, length in ranges:
            assert 0 <= start <= start + length <= math.prod(shape), (key, start, length)
            target = torch.empty(length, dtype=torch.float32)
            values[key].append(target)
            for piece in index.pieces[key]:
                low = max(start, piece.start)
                high = min(start + length, piece.start + piece.length)
                if low < high:
                    copies.setdefault(piece.path, []).append(
                        (piece, low, high, target[low - start : high - start])
                    )
    for path, parts in copies.items():
        with safe_open(path, framework="pt") as file:
            for piece, low, high, target in parts:
                target.copy_(file.get_slice(piece.key)[low - piece.start : high - piece.start])
    return values


def _text(key: TensorKey) -> str:
    return f"{key[0]} {key[1]}"


def _refuse(problems: list[str], summary: str) -> None:
    if problems:
        raise UserError(f"{summary} ({len(problems)} problem(s)):\n  " + "\n  ".join(problems))
