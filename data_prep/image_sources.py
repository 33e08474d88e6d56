"""Where images come from: a folder of them, WebDataset tars or parquet files; each with its class, undecoded."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from data_prep.compression import check_plain, reported
from data_prep.image_tar import read_image_tar
from data_prep.progress import tracked
from data_prep.readers import InputFile, find_files, fingerprint_files, open_parquet
from data_prep.sources import TRAIN, VALIDATION
from pgm_scale import image_pixels
from pgm_scale.errors import UserError

_PARQUET_BATCH_ROWS = 64
_MOST_CLASSES = 100_000  # without names, the highest label says how many there are
_ONE_CLASS = "image"
_KINDS = {".tar": "tar", ".parquet": "parquet"} | dict.fromkeys(image_pixels.SUFFIXES, "folder")


@dataclass(frozen=True)
class ImageFile:
    """`name` is below the input; `content` is bytes, or where they are, so that a worker reads them."""

    name: str
    content: bytes | Path
    label: int

    def read(self) -> bytes:
        """
        Raises:
            UnreadableImage: the file is gone, a dangling link, or not ours to read.
        """
        if isinstance(self.content, bytes):
            return self.content
        try:
            check_plain(self.content)
            with open(self.content, "rb") as file:
                return file.read(image_pixels.LARGEST_FILE_BYTES + 1)
        except OSError as error:
            raise image_pixels.UnreadableImage(f"cannot read it: {error.strerror}") from None


class ImageInput(Protocol):
    """Images of one kind. `class_names` may be known only once all have been read."""

    kind: str
    files: list[InputFile]

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def total(self) -> int | None: ...

    def images(self) -> Iterator[ImageFile]:
        """In an order that is always the same."""
        ...


def open_images(inputs: Sequence[str | Path], class_names_file: Path | None) -> ImageInput:
    """What the inputs hold, all of one kind.

    Raises:
        UserError: no images, several kinds, or names of classes that do not fit.
    """
    files = find_files(inputs, _KINDS, "image (.jpg, .png, ...), .tar or .parquet")
    by_kind = {_KINDS[file.kind]: file for file in files}
    if len(by_kind) > 1:
        found = " and ".join(str(file.path) for file in by_kind.values())
        raise UserError(f"{found}: images, tars and parquet files are not mixed; give inputs of one kind")
    (kind,) = by_kind
    if kind != "folder":
        names = None if class_names_file is None else read_class_names(class_names_file)
        return (TarImages if kind == "tar" else ParquetImages)(files, names)
    if class_names_file is not None:
        raise UserError("--class-names is for tars and parquet files; folders are named after their classes")
    return FolderImages(files)


def read_class_names(path: Path) -> tuple[str, ...]:
    """One name a line, in the order of the labels."""
    try:
        with reported(path):
            names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give one class name a line") from None
    return _checked_names(names, str(path))


def _checked_names(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not names or not all(names):
        raise UserError(f"{where}: has an empty line or none at all; give one class name a line")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise UserError(f"{where}: the class {twice!r} is named twice; give each class a name of its own")
    return names


class FolderImages:
    """Image files, whose first folder is their class; or all in one class, if none is in a folder.

    Ordered by a hash of their names, so that the classes are mixed in every shard.
    """

    kind = "folder"

    def __init__(self, files: list[InputFile]) -> None:
        self.files = files
        classes = {file.name.partition("/")[0] for file in files if "/" in file.name}
        if classes:
            outside = [str(file.path) for file in files if "/" not in file.name]
            if outside:
                raise UserError(
                    f"{outside[0]}: lies beside the folders of classes; give each image a class, or none"
                )
        self._labels = {name: number for number, name in enumerate(_in_order(classes or {_ONE_CLASS}))}

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self._labels)

    def use_classes_of(self, other: FolderImages) -> None:
        unknown = sorted(self._labels.keys() - other._labels.keys())
        if unknown:
            raise UserError(
                f"the class {unknown[0]!r} is in --validation and not in --train; give both the same class folders"
            )
        self._labels = other._labels

    def total(self) -> int:
        return len(self.files)

    def images(self) -> Iterator[ImageFile]:
        for file in sorted(self.files, key=_mixing_key):
            folder = file.name.partition("/")[0] if "/" in file.name else _ONE_CLASS
            yield ImageFile(file.name, file.path, self._labels[folder])


def _in_order(names: set[str]) -> list[str]:
    """Sorted; as numbers if all of them are, so that folder 2 comes before folder 10."""
    numeric = all(name.isascii() and name.isdigit() and len(name) < 19 for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numeric else None)


def _mixing_key(file: InputFile) -> bytes:
    return hashlib.blake2b(file.name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


class LabelledImages:
    """Images with a number as their class; without names, classes are named by it."""

    def __init__(self, files: list[InputFile], names: tuple[str, ...] | None) -> None:
        self.files = files
        self.names = names
        self._highest = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names or tuple(map(str, range(self._highest + 1)))

    def _image(self, file: InputFile, place: str, content: bytes, label: int) -> ImageFile:
        classes = _MOST_CLASSES if self.names is None else len(self.names)
        if not 0 <= label < classes:
            named = "--class-names names" if self.names is not None else "without --class-names, at most"
            raise UserError(
                f"{file.path}, {place}: label {label}, but {named} {classes} classes; labels count from 0"
            )
        self._highest = max(self._highest, label)
        return ImageFile(f"{file.name}:{place}", content, label)


class TarImages(LabelledImages):
    kind = "tar"

    def total(self) -> None:
        return None

    def images(self) -> Iterator[ImageFile]:
        for file in self.files:
            for member, content, label in read_image_tar(file.path):
                yield self._image(file, member, content, label)


class ParquetImages(LabelledImages):
    """Columns `image` (bytes, or a struct with `bytes`, as Hugging Face writes them) and `label`."""

    kind = "parquet"

    def __init__(self, files: list[InputFile], names: tuple[str, ...] | None) -> None:
        super().__init__(files, names or _names_in_metadata(files[0].path))

    def total(self) -> int:
        return sum(_rows_of(file.path) for file in self.files)

    def images(self) -> Iterator[ImageFile]:
        for file in self.files:
            for row, (content, label) in enumerate(_read_parquet(file.path), start=1):
                yield self._image(file, f"row {row}", content, label)


def _rows_of(path: Path) -> int:
    with open_parquet(path) as parquet:
        return int(parquet.metadata.num_rows)


def _names_in_metadata(path: Path) -> tuple[str, ...] | None:
    """The class names that Hugging Face's `datasets` keeps in a file's schema, if there are any."""
    with open_parquet(path) as parquet:
        metadata = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"")
    try:
        names = json.loads(metadata)["info"]["features"]["label"]["names"]
        return _checked_names(tuple(map(str, names)), f"{path}, its class names")
    except (ValueError, LookupError, TypeError):
        return None


def _read_parquet(path: Path) -> Iterator[tuple[bytes, int]]:
    import pyarrow.types as types

    with open_parquet(path) as parquet:
        schema = parquet.schema_arrow
        absent = [name for name in ("image", "label") if name not in schema.names]
        if absent:
            found = ", ".join(map(repr, schema.names))
            raise UserError(f"{path}: no column {absent[0]!r} (found {found}); rename the columns")
        image, label = schema.field("image").type, schema.field("label").type
        in_struct = types.is_struct(image) and image.get_field_index("bytes") >= 0
        content = image.field("bytes").type if in_struct else image
        if not (types.is_binary(content) or types.is_large_binary(content)) or not types.is_integer(label):
            raise UserError(
                f"{path}: columns image: {image} and label: {label}; image must be bytes, or a struct with them, "
                "and label a whole number"
            )
        row = 0
        for batch in parquet.iter_batches(_PARQUET_BATCH_ROWS, columns=["image", "label"]):
            images, labels = (batch.column(name).to_pylist() for name in ("image", "label"))
            for entry, number in zip(images, labels, strict=True):
                row += 1
                if number is None:
                    raise UserError(f"{path}, row {row}: null in 'label'; drop or fill such rows")
                yield ((entry or {}).get("bytes") if in_struct else entry) or b"", number


class ImageSource:
    """Images for training and validation: two inputs, or one that is split by the hash of the images' bytes.

    An image is for validation if its hash is in the lowest share of all possible hashes, so equal images are on
    one side; the one of the lowest hash always is. That takes one more pass over the input.
    """

    def __init__(self, train: ImageInput, validation: ImageInput | float) -> None:
        """`validation` is its own input, or the share of `train` that is for it."""
        self._inputs = {TRAIN: train}
        self._share: float | None = None
        self._hashes: array[int] | None = None
        if isinstance(validation, float):
            if not 0 < validation < 1:
                raise UserError(f"--validation-share {validation} is not between 0 and 1; 0.01 is usual")
            self._share = validation
            return
        if train.kind != validation.kind:
            raise UserError(
                f"--train has a {train.kind} and --validation a {validation.kind}; give both of one kind"
            )
        if isinstance(train, FolderImages) and isinstance(validation, FolderImages):
            validation.use_classes_of(train)
        if _given_names(train) != _given_names(validation):
            raise UserError("--train and --validation have other class names; give them by --class-names")
        self._inputs[VALIDATION] = validation

    @property
    def class_names(self) -> tuple[str, ...]:
        """Known once all images have been read."""
        return max((images.class_names for images in self._inputs.values()), key=len)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the images, in plain JSON values."""
        kind, names = self._inputs[TRAIN].kind, _given_names(self._inputs[TRAIN])
        fingerprints = {
            split: fingerprint_files(images.files, may_be_unreadable=kind == "folder")
            for split, images in self._inputs.items()
        }
        return {
            "kind": kind,
            "class_names_sha256": names and hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "validation_share": self._share,
            "input": fingerprints,
        }

    def total(self) -> int | None:
        if self._share is not None:
            return len(self._survey())
        totals = [images.total() for images in self._inputs.values()]
        return None if None in totals else sum(total or 0 for total in totals)

    def images(self) -> Iterator[tuple[str, ImageFile]]:
        """(split, image) of each image."""
        if self._share is None:
            for split, images in self._inputs.items():
                yield from ((split, image) for image in images.images())
            return
        hashes = self._survey()
        highest = max(int(self._share * 2**64), min(hashes))
        for value, image in zip_longest(hashes, self._inputs[TRAIN].images()):
            if value is None or image is None:
                raise UserError("the input changed while it was read; run the same command again")
            yield VALIDATION if value <= highest else TRAIN, image

    def _survey(self) -> array[int]:
        """The hash of every image of the one input, in order: 8 bytes an image."""
        if self._hashes is None:
            train = self._inputs[TRAIN]
            images = tracked(train.images(), "surveying the images", train.total())
            self._hashes = array("Q", map(_hash, images))
            if not self._hashes:
                raise UserError(f"{train.files[0].path}: no images in it; give other inputs")
        return self._hashes


def _given_names(images: ImageInput) -> tuple[str, ...] | None:
    return images.names if isinstance(images, LabelledImages) else None


def _hash(image: ImageFile) -> int:
    """64 bits of the content; what cannot be read is left out later and counts as empty."""
    try:
        content = image.read()
    except image_pixels.UnreadableImage:
        content = b""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
