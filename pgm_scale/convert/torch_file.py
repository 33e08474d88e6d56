"""Files of `torch.save`, both formats, and plain pickles, opened as data: tensors and plain containers.

Tensors are views of the mapped file, so nothing is allocated for what a file claims: each storage must lie in the
file, every tensor in its storage. The zip format stores its parts uncompressed, and others are refused, as
are parts whose CRC is wrong. What is neither a tensor nor plain becomes a `Record` (`restricted_pickle`).
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgm_scale.convert.restricted_pickle import PLAIN_BUILDERS, Builders, PickleError, Record, load
from pgm_scale.errors import UserError
from pgm_scale.files import check_regular

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MOST_DIMENSIONS = 64
_ZIP_START = b"PK\x03\x04"

_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGE_TYPES.values()}


@dataclass(frozen=True)
class Storage:
    """The one-dimensional tensor of all that a storage holds."""

    values: Tensor


def open_torch_file(path: str | Path) -> Any:
    """The content of a file, on the CPU; the file must stay as it is while its tensors are in use.

    Raises:
        UserError: no such file, or one that is damaged, has parts elsewhere, or is of another kind.
    """
    path = Path(path)
    try:
        check_regular(path)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a checkpoint file") from None
    except ValueError:
        raise UserError(f"{path} is empty; download or copy it again") from None
    try:
        return _zip_content(mapped) if mapped[:4] == _ZIP_START else _pickle_content(mapped)
    except MemoryError:
        raise
    except Exception as error:  # what a garbled or hostile file leads to has no base class
        reason = " ".join(str(error).split())[:200] if isinstance(error, PickleError) else "damaged"
        raise UserError(
            f"{path} cannot be read as a checkpoint of torch ({reason or 'damaged'}); download or copy it again"
        ) from None


def refuse_compressed(path: str | Path) -> None:
    """For those who let torch open a file, which inflates what torch never deflates: gigabytes of a megabyte.

    Raises:
        PickleError: parts of it are compressed.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise PickleError("compressed parts")


def _zip_content(mapped: mmap.mmap) -> Any:
    with zipfile.ZipFile(io.BufferedReader(_Mapped(mapped))) as archive:
        parts = _parts(mapped, archive)
    found = [name for name in parts if name.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1:
        raise PickleError("a zip file without data.pkl")
    root = found[0].removesuffix("data.pkl")
    byteorder = parts.get(f"{root}byteorder", slice(0, 0))
    if mapped[byteorder] not in (b"", sys.byteorder.encode()):
        raise PickleError("of a machine with another byte order")

    def region(key: str, numel: int, dtype: torch.dtype) -> slice:
        part = parts.get(f"{root}data/{key}")
        if part is None:
            raise PickleError(f"storage {key[:100]} is not in it")
        return part

    return _with_storages(io.BytesIO(mapped[parts[found[0]]]), _Storages(mapped, region))


def _parts(mapped: mmap.mmap, archive: zipfile.ZipFile) -> dict[str, slice]:
    """Where the bytes of each part lie, of a zip file whose parts are whole, uncompressed and apart."""
    parts: dict[str, slice] = {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.filename in parts:
            raise PickleError("compressed, encrypted or doubled parts")
        name_size, extra_size = struct.unpack_from("<HH", mapped, entry.header_offset + 26)
        start = entry.header_offset + 30 + name_size + extra_size
        part = slice(start, start + entry.file_size)
        if part.stop > len(mapped):
            raise PickleError("cut")
        parts[entry.filename] = part
    if sum(part.stop - part.start for part in parts.values()) > len(mapped):
        raise PickleError("parts that overlap")
    for entry in archive.infolist():
        if zlib.crc32(memoryview(mapped)[parts[entry.filename]]) != entry.CRC:
            raise PickleError(f"{entry.filename[:100]} in it is damaged")
    return parts


class _Mapped(io.RawIOBase):
    """The mapped file for `zipfile`, which would close a file of its own."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped, self.position = mapped, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, len(self.mapped))[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        piece = self.mapped[self.position : self.position + len(buffer)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)


def _pickle_content(mapped: mmap.mmap) -> Any:
    """Of the legacy format, which starts with a pickled number, or of a plain pickle."""
    first = load(mapped)  # type: ignore[arg-type]
    if type(first) is not int or first != _LEGACY_MAGIC:
        return first
    if load(mapped) != _LEGACY_VERSION:  # type: ignore[arg-type]
        raise PickleError("of an unknown version")
    system = load(mapped)  # type: ignore[arg-type]
    if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
        raise PickleError("of a machine with another byte order")
    # The storages come behind the pickle that uses them: it is read once to find them, and again with them.
    start, named = mapped.tell(), _NamedStorages()
    _with_storages(mapped, named)
    regions = _legacy_regions(mapped, named)
    mapped.seek(start)
    return _with_storages(mapped, _Storages(mapped, lambda key, numel, dtype: regions[key]))


def _legacy_regions(mapped: mmap.mmap, named: _NamedStorages) -> dict[str, slice]:
    regions: dict[str, slice] = {}
    keys = load(mapped)  # type: ignore[arg-type]
    start = mapped.tell()
    for key in keys:
        (numel,) = struct.unpack_from("<q", mapped, start)
        end = start + 8 + numel * named.dtypes[key].itemsize
        if numel < 0 or end > len(mapped) or key in regions:
            raise PickleError(f"storage {str(key)[:100]} is not whole")
        regions[key] = slice(start + 8, end)
        start = end
    return regions


class _NamedStorages:
    """Storages of a first pass: empty, but their types are noted."""

    def __init__(self) -> None:
        self.dtypes: dict[str, torch.dtype] = {}

    def __call__(self, identity: Any) -> None:
        dtype, key, _ = _parsed(identity)
        if self.dtypes.setdefault(key, dtype) != dtype:
            raise PickleError(f"storage {key[:100]} is of two types")


class _Storages:
    """Storages by their persistent ids, as views of the mapped file."""

    def __init__(self, mapped: mmap.mmap, region: Callable[[str, int, torch.dtype], slice]) -> None:
        self.mapped, self.region = mapped, region
        self.known: dict[tuple[str, torch.dtype], Storage] = {}

    def __call__(self, identity: Any) -> Storage:
        dtype, key, numel = _parsed(identity)
        if (key, dtype) not in self.known:
            self.known[key, dtype] = Storage(self._values(self.region(key, numel, dtype), dtype))
        return self.known[key, dtype]

    def _values(self, region: slice, dtype: torch.dtype) -> Tensor:
        count, left = divmod(region.stop - region.start, dtype.itemsize)
        if left:
            raise PickleError("a storage of half a number")
        if not count:
            return torch.empty(0, dtype=dtype)
        if region.start % dtype.itemsize:  # the legacy format aligns nothing
            return torch.frombuffer(bytearray(self.mapped[region]), dtype=dtype)
        return torch.frombuffer(self.mapped, dtype=dtype, count=count, offset=region.start)


def _parsed(identity: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and size of `("storage", type, key, location, numel[, view])`."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise PickleError("a persistent id that is of no storage")
    storage_type, key, _, numel = identity[1:5]
    dtype = _STORAGE_TYPES.get(storage_type.name) if isinstance(storage_type, Record) else None
    if (
        dtype is None
        or not isinstance(key, str)
        or type(numel) is not int
        or identity[5:] not in ((), (None,))
    ):
        raise PickleError("a storage of an unknown kind")
    return dtype, key, numel


def _with_storages(file: Any, storages: Callable[[Any], Any]) -> Any:
    return load(file, _TENSOR_BUILDERS, storages)


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: torch.dtype | None = None
) -> Tensor | None:
    """A view of a storage that holds all of it; None in the first pass, which has no storages."""
    if storage is None:
        return None
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without a storage")
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise PickleError("a tensor of impossible shape")
    # Bounded first: products of integers of megabytes take hours.
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in (offset, *size, *stride)):
        raise PickleError("a tensor of impossible shape")
    values = storage.values if dtype is None else storage.values.view(dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > values.numel() or (0 not in size and last >= values.numel()):
        raise PickleError("a tensor that is larger than its storage")
    return values.as_strided(size, stride, 0 if 0 in size else offset)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor | None:
    known = _DTYPES.get(dtype.path) if isinstance(dtype, Record) else None
    if known is None:
        raise PickleError("a tensor of an unknown type")
    return _rebuild_tensor(storage, offset, size, stride, dtype=known)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes, which are left out."""
    builder = _REBUILDERS.get(function.path) if isinstance(function, Record) else None
    if builder is None:
        raise PickleError("a tensor of an unknown class")
    return builder(*args)


_REBUILDERS: Builders = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_TENSOR_BUILDERS: Builders = {
    **PLAIN_BUILDERS,
    **_REBUILDERS,
    "torch.Size": lambda items=(): tuple(items),
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}


def named_tensors(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors among the items of a mapping, and the names of what is none."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors, [str(name)[:200] for name, value in content.items() if not isinstance(value, Tensor)]
