"""Fragments: what one rank owns of the model and optimizer, and the file it writes them to.

A fragment is a flat range of a whole tensor, so a file says nothing of the layout that wrote it. The file is
plain safetensors. Each tensor in it is 1-D fp32 under the key `<kind>/<name>@<start>`; the metadata holds the
format's version and the whole tensors' shapes. A later version may add a local block to a key (the box of the
whole tensor that `start` counts in, for tensor-parallel shards); readers refuse a version they do not know.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pgm_scale.errors import UserError

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TensorKey = tuple[Kind, str]  # kind and parameter name
FORMAT = "pgm-scale fragments 1"
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Fragment:
    """The flat range [start, start + len(values)) of the row-major whole tensor `name`.

    Args:
        name: the parameter's name in the whole model.
        global_shape: shape of the whole tensor.
        start: offset of the range in the flattened whole tensor, in elements.
        values: 1-D fp32 on any device; may be empty. It is not copied: it must not change while it is saved.
    """

    name: str
    global_shape: tuple[int, ...]
    start: int
    values: torch.Tensor

    def __post_init__(self) -> None:
        assert self.values.dtype == torch.float32, (self.name, self.values.dtype)
        assert self.values.dim() == 1, (self.name, self.values.shape)
        assert 0 <= self.start <= math.prod(self.global_shape) - len(self.values), self.name


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint step, as the manifest lists it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """Where a stored fragment lies: `length` elements from `start` on, under `key` in the file `path`."""

    path: Path
    key: str
    start: int
    length: int


def write_fragments(path: Path, fragments: Iterable[tuple[Kind, Fragment]]) -> FileEntry:
    """Write one rank's fragments and wait until they are on the disk.

    The hash is taken from the bytes on their way out, which saves reading the file again; at load it tells
    whether the disk holds what was meant. One fragment at a time is copied to the host: the extra memory of a
    save is the largest fragment, given that `fragments` yields views of what the rank holds anyway.

    Raises:
        OSError: the disk is full, the folder is read-only, ...
    """
    owned = list(fragments)
    digest = hashlib.sha256()
    size_bytes = 0
    with open(path, "wb") as file:
        for chunk in _chunks(owned):
            digest.update(chunk)
            size_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path.name, size_bytes, digest.hexdigest())


def _chunks(owned: list[tuple[Kind, Fragment]]) -> Iterable[memoryview]:
    """The bytes of the safetensors file: header length, header, then the values in header order."""
    header = _header(owned)
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for _, fragment in owned:
        host = fragment.values.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
        payload = memoryview(host.view(np.uint8).data)
        for start in range(0, len(payload), _CHUNK_BYTES):
            yield payload[start : start + _CHUNK_BYTES]


def _header(owned: list[tuple[Kind, Fragment]]) -> bytes:
    shapes = {fragment.name: list(fragment.global_shape) for _, fragment in owned}
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "shapes": json.dumps(shapes)}}
    end = 0
    for kind, fragment in owned:
        key = f"{kind}/{fragment.name}@{fragment.start}"
        assert kind in KINDS, kind
        assert key not in header, f"two fragments of {key} on one rank"
        begin, end = end, end + 4 * len(fragment.values)
        header[key] = {"dtype": "F32", "shape": [len(fragment.values)], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)  # the format aligns the values to 8 bytes


def list_pieces(path: Path) -> list[tuple[TensorKey, tuple[int, ...], Piece]]:
    """Kind and name, whole shape and place of every fragment in a file; reads its header only.

    Raises:
        UserError: the file is no safetensors file of ours, or of a version that is not known here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path}: its format is {metadata.get('format')!r}, this version reads {FORMAT!r}; "
                    "load it with the version of pgm-scale that wrote it"
                )
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            return [_piece(path, key, file.get_slice(key).get_shape(), shapes) for key in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable fragment file ({error}); use another step") from None


def _piece(
    path: Path, key: str, shape: list[int], shapes: dict[str, tuple[int, ...]]
) -> tuple[TensorKey, tuple[int, ...], Piece]:
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    return (cast(Kind, kind), name), shapes[name], Piece(path, key, int(start), shape[0])
