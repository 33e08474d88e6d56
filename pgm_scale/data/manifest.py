"""`dataset.json`: what one split folder holds, and the hash of every shard in it.

A split folder is `{dataset.json, tokenizer.json, shards...}`. The manifest is written last, so a folder that
has one is complete. Its bytes are a function of its fields alone, and one of them is the SHA-256 of the others:
a flipped digit of `mask_id` would be valid JSON. Files of format version 1 lack it and are still read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pgm_scale.data import strict_json
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes

MANIFEST_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer.json"
VQ_WEIGHTS_NAME = "vq.safetensors"  # beside the tokenizer.json of image codes, which holds its SHA-256
FORMAT_VERSION = 2
_UNHASHED_VERSION = 1

TokenDtype = Literal["uint8", "uint16", "uint32"]
ShardFormat = Literal["mds", "tar"]

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_COUNT = 2**53  # beyond it other programs would read another number
LARGEST_VOCABULARY = 2**24  # far above any: a wild id must not become an embedding of terabytes
_SHOWN = 4


def token_dtype_for(vocabulary_size: int) -> TokenDtype:
    """The type of stored ids below `vocabulary_size`; the values of pixels are uint8."""
    return "uint16" if vocabulary_size <= np.iinfo(np.uint16).max + 1 else "uint32"


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of a model. `size` includes the mask's row; `pad_id` is None where rows are always full."""

    size: int
    mask_id: int
    bos_id: int
    eos_id: int
    pad_id: int | None


@dataclass(frozen=True)
class Shard:
    """One shard file, named relative to the split folder."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ImageContent:
    """What the rows of an image data set are; every row has a label, a number below `len(class_names)`.

    Attributes:
        tokens: `codes` are BOS and the VQ codes of a grid, row by row; `pixels` are the values 0 to 255 of an image
            in the order (row, column, channel), without BOS.
        side_pixels: of the square images.
        channels: of the images.
        grid_side: codes in a row of the grid; of `pixels`, `side_pixels`.
    """

    tokens: Literal["codes", "pixels"]
    side_pixels: int
    channels: int
    grid_side: int
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class DatasetManifest:
    """The contents of `dataset.json`.

    `tokenizer_sha256` is the SHA-256 of the folder's `tokenizer.json`, which of images describes the VQ tokenizer.
    `tokens` counts the valid (not padded) tokens of all rows. `source` says where the text or the images came
    from, in plain JSON values. `images` is None for text.
    """

    format: ShardFormat
    split: str
    vocabulary: Vocabulary
    tokenizer_sha256: str
    length_tokens: int
    token_dtype: TokenDtype
    packing: str
    source: dict[str, Any]
    documents: int
    rows: int
    tokens: int
    shards: tuple[Shard, ...]
    images: ImageContent | None = None

    @property
    def rows_per_shard(self) -> tuple[int, ...]:
        return tuple(shard.rows for shard in self.shards)

    def to_json(self) -> str:
        """Deterministic text: sorted keys, two spaces, one final newline; `images` only where there are some."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        if self.images is None:
            del content["images"]
        return json.dumps(content | {"sha256": _content_sha256(content)}, sort_keys=True, indent=2) + "\n"

    def save(self, split_folder: str | Path) -> Path:
        """Write `dataset.json` into `split_folder`, whole or not at all."""
        path = Path(split_folder) / MANIFEST_NAME
        atomic_write_bytes(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls, split_folder: str | Path) -> DatasetManifest:
        """Read `dataset.json` of a local split folder and see that every shard it names is there, of its size.

        Raises:
            UserError: no manifest, a manifest that is garbled, contradicts itself or is of another version,
                or the names of the shards that are absent or have another size.
        """
        folder = Path(split_folder)
        path = folder / MANIFEST_NAME
        try:
            if path.exists() and not path.is_file():  # reading a FIFO would wait for ever
                raise UserError(
                    f"{path}: not a plain file; give a split folder written by `pgm-scale prepare`"
                )
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the dataset manifest ({error.strerror}); "
                "give a split folder written by `pgm-scale prepare`"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; prepare the dataset again") from None
        manifest = cls.from_json(text, str(path))
        _check_files(folder, manifest.shards)
        return manifest

    @classmethod
    def from_json(cls, text: str, where: str) -> DatasetManifest:
        """Parse the text of a manifest; `where` names it in the `UserError`."""
        try:
            content = strict_json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}); prepare the dataset again") from None
        if not isinstance(content, dict):
            raise UserError(f"{where}: expected a JSON object; prepare the dataset again")
        version = content.get("format_version")
        if type(version) is not int or version not in (FORMAT_VERSION, _UNHASHED_VERSION):
            raise UserError(
                f"{where}: format_version {_short(version)}, but this program reads {FORMAT_VERSION}; "
                "prepare the dataset again or use the version of pgm-scale that wrote it"
            )
        written = content.pop("sha256", None) if version == FORMAT_VERSION else None
        found = _content_sha256(content)
        del content["format_version"]
        try:
            manifest = cls(
                **content
                | {
                    "vocabulary": Vocabulary(**content["vocabulary"]),
                    "shards": tuple(Shard(**shard) for shard in content["shards"]),
                    "images": _image_content(content.get("images")),
                }
            )
            problems = _problems(manifest)
        except KeyError as error:
            raise UserError(f"{where}: {error} is missing; prepare the dataset again") from None
        except TypeError as error:
            raise UserError(f"{where}: {_plain(error)}; prepare the dataset again") from None
        if version == FORMAT_VERSION and not problems and written != found:
            problems.append("it is not what was written: its sha256 is of other content; copy it again")
        if problems:
            more = f"; and {len(problems) - _SHOWN} more problems" if len(problems) > _SHOWN else ""
            raise UserError(f"{where}: {'; '.join(problems[:_SHOWN])}{more}; prepare the dataset again")
        return manifest

    def differences(self, other: DatasetManifest, *, same_data: bool = False) -> list[str]:
        """What keeps `other` from being used with the same model, one readable line each; empty if nothing.

        With `same_data`, also everything that would change the order or content of the samples, which is what
        a resumed run must not see.
        """
        names = [f"vocabulary.{f.name}" for f in dataclasses.fields(Vocabulary)]
        names += ["tokenizer_sha256", "length_tokens"]
        if same_data:
            names += ["format", "token_dtype", "packing", "documents", "rows", "tokens"]
        mine, theirs = ({name: _value_of(m, name) for name in names} for m in (self, other))
        lines = [f"{name}: {mine[name]} != {theirs[name]}" for name in names if mine[name] != theirs[name]]
        lines += image_differences(self.images, other.images)
        return lines + (_shard_differences(self.shards, other.shards) if same_data else [])


def _content_sha256(content: dict[str, Any]) -> str:
    """Of the values, whatever white space is between them."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_files(folder: Path, shards: tuple[Shard, ...]) -> None:
    """Absent and cut files are told before the first step; which bytes are in them, when they are opened."""
    absent, wrong = [], []
    for shard in shards:
        try:
            found = (folder / shard.name).stat()
        except OSError:
            absent.append(shard.name)
            continue
        if not stat.S_ISREG(found.st_mode):
            wrong.append(f"{shard.name} is not a plain file")
        elif found.st_size != shard.bytes:
            wrong.append(f"{shard.name} has {found.st_size} bytes instead of {shard.bytes}")
    of = f"of {len(shards)} shards are"
    problems = [f"{len(absent)} {of} missing: {', '.join(absent)}"] if absent else []
    problems += [f"{len(wrong)} {of} not as written: {', '.join(wrong)}"] if wrong else []
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; copy them back or prepare the dataset again")


def _value_of(manifest: DatasetManifest, name: str) -> Any:
    value: Any = manifest
    for part in name.split("."):
        value = getattr(value, part)
    return value


def image_differences(mine: ImageContent | None, theirs: ImageContent | None) -> list[str]:
    """One short line for each field that differs; of a thousand class names, the first that does."""
    if mine is None or theirs is None:
        named = ["text" if images is None else "images" for images in (mine, theirs)]
        return [] if mine is theirs else [f"content: {named[0]} != {named[1]}"]
    names = [f.name for f in dataclasses.fields(ImageContent) if f.name != "class_names"]
    lines = [
        f"images.{name}: {getattr(mine, name)} != {getattr(theirs, name)}"
        for name in names
        if getattr(mine, name) != getattr(theirs, name)
    ]
    if len(mine.class_names) != len(theirs.class_names):
        lines.append(f"images.class_names: {len(mine.class_names)} != {len(theirs.class_names)} classes")
    elif mine.class_names != theirs.class_names:
        pairs = enumerate(zip(mine.class_names, theirs.class_names, strict=True))
        number, (one, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        lines.append(f"images.class_names: class {number} is {one!r} != {other!r}")
    return lines


def _shard_differences(mine: tuple[Shard, ...], theirs: tuple[Shard, ...]) -> list[str]:
    """At most a count and the first differing shard: a list of thousands helps nobody."""
    lines = [] if len(mine) == len(theirs) else [f"shards: {len(mine)} != {len(theirs)}"]
    different = [(a, b) for a, b in zip(mine, theirs, strict=False) if a != b]
    if different:
        first, second = different[0]
        lines.append(f"shards: {len(different)} differ, the first is {first} != {second}")
    return lines


def _problems(manifest: DatasetManifest) -> list[str]:
    """Fields of a wrong type or that contradict each other; a wrong type may also raise `TypeError`."""
    problems = _number_problems(manifest)
    if problems:
        return problems
    vocabulary = manifest.vocabulary
    if manifest.format not in ("mds", "tar"):
        problems.append(f"format {_short(manifest.format)} is neither mds nor tar")
    problems += _image_problems(manifest)
    holds_pixels = manifest.images is not None and manifest.images.tokens == "pixels"
    if manifest.token_dtype != ("uint8" if holds_pixels else token_dtype_for(vocabulary.size)):
        problems.append(f"token_dtype {_short(manifest.token_dtype)} does not fit {vocabulary.size} tokens")
    for name in ("mask_id", "bos_id", "eos_id", "pad_id"):
        token = getattr(vocabulary, name)
        if token is None and name == "pad_id":
            continue
        if type(token) is not int or not 0 <= token < vocabulary.size:
            problems.append(f"vocabulary.{name} {_short(token)} is no id below the size {vocabulary.size}")
    names = [shard.name for shard in manifest.shards]
    if not names:
        problems.append("it names no shards")
    if len(set(names)) < len(names):
        problems.append("a shard is named twice")
    problems += [f"bad shard name {_short(name)}" for name in names if not _SHARD_NAME.fullmatch(name)]
    problems += [f"bad sha256 of {s.name}" for s in manifest.shards if not _SHA256.fullmatch(s.sha256)]
    problems += _text_problems(manifest)
    if problems:
        return problems
    row_bytes = np.dtype(manifest.token_dtype).itemsize * manifest.length_tokens
    problems += [
        f"{s.name} of {s.bytes} bytes cannot hold {s.rows} rows of {row_bytes} bytes"
        for s in manifest.shards
        if s.bytes < s.rows * row_bytes
    ]
    if manifest.rows != sum(manifest.rows_per_shard):
        problems.append(f"rows {manifest.rows}, but its shards have {sum(manifest.rows_per_shard)}")
    return problems


def _text_problems(manifest: DatasetManifest) -> list[str]:
    problems = [
        f"{name} is {_short(value)}, not text"
        for name, value in (("split", manifest.split), ("packing", manifest.packing))
        if not isinstance(value, str)
    ]
    if not isinstance(manifest.source, dict):
        problems.append("source is not a JSON object")
    if not _SHA256.fullmatch(manifest.tokenizer_sha256):
        problems.append("bad tokenizer_sha256")
    return problems


def _image_content(tree: dict[str, Any] | None) -> ImageContent | None:
    if tree is None:
        return None
    names = tree["class_names"]
    return ImageContent(**tree | {"class_names": tuple(names) if isinstance(names, list) else ()})


def _image_problems(manifest: DatasetManifest) -> list[str]:
    images = manifest.images
    if images is None:
        return []
    problems = []
    row_tokens = {"codes": 1 + images.grid_side**2, "pixels": images.side_pixels**2 * images.channels}
    if images.tokens not in row_tokens:
        problems.append(f"images.tokens {_short(images.tokens)} is neither codes nor pixels")
    elif manifest.length_tokens != row_tokens[images.tokens]:
        problems.append(
            f"length_tokens {manifest.length_tokens}, but the {images.tokens} of an image are "
            f"{row_tokens[images.tokens]} tokens"
        )
    if images.tokens == "pixels" and images.grid_side != images.side_pixels:
        problems.append(
            f"images.grid_side {images.grid_side} of pixels is not side_pixels {images.side_pixels}"
        )
    if not images.class_names or not all(isinstance(name, str) for name in images.class_names):
        problems.append("images.class_names are not names")
    elif len(set(images.class_names)) < len(images.class_names):
        problems.append("two images.class_names are equal")
    return problems


def _number_problems(manifest: DatasetManifest) -> list[str]:
    """Counts that are no sensible positive integers; ids are compared with the size by the caller."""
    counts = {"vocabulary.size": manifest.vocabulary.size, "length_tokens": manifest.length_tokens}
    counts |= {"rows": manifest.rows, "tokens": manifest.tokens, "documents": manifest.documents}
    if manifest.images is not None:
        names = ("side_pixels", "channels", "grid_side")
        counts |= {f"images.{name}": getattr(manifest.images, name) for name in names}
    for shard in manifest.shards:
        counts |= {f"{shard.name}.rows": shard.rows, f"{shard.name}.bytes": shard.bytes}
    problems = [
        f"{name} is {_short(value)}, not a positive integer below 2**53"
        for name, value in counts.items()
        if type(value) is not int or not 1 <= value <= _LARGEST_COUNT
    ]
    if not problems and manifest.vocabulary.size > LARGEST_VOCABULARY:
        problems.append(f"vocabulary.size {manifest.vocabulary.size} is above {LARGEST_VOCABULARY}")
    return problems


def _short(value: Any) -> str:
    """A value of any type for a line: a number may have thousands of digits."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _plain(error: TypeError) -> str:
    """`Shard.__init__() got an unexpected keyword argument 'x'` without the Python in front."""
    return re.sub(r"^(\w+\.)?__init__\(\) ", "", str(error))
