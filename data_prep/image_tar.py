"""WebDataset tars of images, streamed: `<key>.jpg` (or .jpeg, .png) with `<key>.cls` or `<key>.json` beside it.

Nothing is ever extracted to disk, and a tar that only an attacker would write is refused with the member's name:
links, devices, paths that leave the folder, sizes that no image has. So is one that is damaged or cut off, also
where tar readers take it for complete: at a member's boundary, at a header that cannot be read, or at zeros that
are not its end. Nothing that is named like an image or a label is left out without a word.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from data_prep.compression import open_binary, reported
from pgm_scale.errors import UserError
from pgm_scale.image_pixels import LARGEST_FILE_BYTES, SUFFIXES

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
_LABEL_SUFFIXES = ("cls", "json")
# A member that ends so belongs to a sample, whatever stands between its key and this.
_OF_A_SAMPLE = {*(suffix.removeprefix(".") for suffix in SUFFIXES), *_LABEL_SUFFIXES}
_LARGEST_TEXT_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 18

# What tarfile raises at odd headers besides its own: numbers, encodings and offsets that are none, long chains.
_HOSTILE = (ValueError, LookupError, ArithmeticError, RecursionError)


class _Refused(Exception):
    """Says what is wrong with the archive, without its name."""


@dataclass
class _Sample:
    key: str
    first_member: str
    image: tuple[str, bytes] | None = None
    labels: dict[str, bytes] = field(default_factory=dict)


def read_image_tar(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """(member, content, label) of each image of a .tar, .tar.gz or .tar.zst, in order.

    Raises:
        UserError: a hostile or damaged archive, or a sample without an image or a label.
    """
    try:
        with reported(path), open_binary(path) as stream:
            for sample in _samples(stream):
                if sample.image is None:
                    raise _Refused(
                        f"sample {sample.key!r} has no .jpg, .jpeg or .png (it has {sample.first_member!r}; what "
                        "follows the first dot must be the suffix)"
                    )
                yield *sample.image, _label(sample)
    except (tarfile.TarError, _Refused) as error:
        raise _refusal(path, str(error)) from None
    except _HOSTILE as error:
        raise _refusal(
            path, f"it has a header that cannot be read ({type(error).__name__}: {error})"
        ) from None


def _refusal(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; the archive is refused, pack it again")


def _samples(stream: object) -> Iterator[_Sample]:
    """Members that follow each other and have the same name up to the first dot."""
    sample = None
    seen: set[bytes] = set()  # hashes of the keys: a tar may have a million
    for name, content in _members(stream):
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        suffix = suffix.lower()
        if not stem or suffix.rpartition(".")[2] not in _OF_A_SAMPLE:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key, name)
            known = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            if known in seen:
                raise _Refused(f"sample {key!r} comes again with {name!r}, after other samples")
            seen.add(known)
        if suffix in _LABEL_SUFFIXES:
            if suffix in sample.labels:
                raise _Refused(f"sample {key!r} has two labels, the second is {name!r}")
            sample.labels[suffix] = content
        elif suffix in IMAGE_SUFFIXES:
            if sample.image is not None:
                raise _Refused(f"sample {key!r} has two images, {sample.image[0]!r} and {name!r}")
            sample.image = (name, content)
    if sample is not None:
        yield sample


def _members(stream: object) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members = []  # tarfile keeps them all: a leak over a million images
            _check(member)
            if member.isreg():
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, content.read()
        _check_end(archive.fileobj)


def _check_end(stream: Any) -> None:
    """Nothing but zeros may follow the zeros at which tarfile stops."""
    while block := stream.read(_BLOCK_BYTES):
        if block.strip(b"\0"):
            raise _Refused("more follows its end (a damaged header, or several archives in one file)")


def _check(member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise _Refused(f"its member {member.name!r} leaves the folder")
    if not (member.isdir() or (member.isreg() and not member.issparse())):
        raise _Refused(f"its member {member.name!r} is not a plain file")
    _check_size(member, LARGEST_FILE_BYTES)  # extended headers may have changed it since `_Header`


def _check_size(member: tarfile.TarInfo, largest: int) -> None:
    if not 0 <= member.size <= largest:
        raise _Refused(f"its member {member.name!r} declares {member.size} bytes, more than {largest}")


class _Header(tarfile.TarInfo):
    """Refuses what tarfile would swallow: bad headers as an end, and names of gigabytes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):  # the block of zeros that ends an archive
                raise
            raise _Refused(f"it is damaged or cut off ({error})") from None
        if member.type == tarfile.XGLTYPE:  # each adds to what tarfile keeps to the end
            raise _Refused(f"its member {member.name!r} is a global pax header")
        is_content = member.type in tarfile.SUPPORTED_TYPES and member.type not in _NAMES
        _check_size(member, LARGEST_FILE_BYTES if is_content else _LARGEST_TEXT_BYTES)
        return member


# Members that tarfile itself reads into memory, for the name and metadata of the one that follows.
_NAMES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _label(sample: _Sample) -> int:
    try:
        if "cls" in sample.labels:
            return int(sample.labels["cls"].decode("ascii"))
        if "json" in sample.labels:
            label = json.loads(sample.labels["json"])["label"]
            if type(label) is int:
                return label
            raise ValueError(f"{label!r} is not a whole number")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Refused(f"sample {sample.key!r} has no readable label ({error})") from None
    raise _Refused(f"sample {sample.key!r} has no label (a .cls, or a .json with the key 'label')")
