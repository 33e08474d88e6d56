"""Images to rows of pixels, or of the codes of a VQ tokenizer: what `data_prep.pipeline` has to know of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from data_prep.image_encoding import (
    PIXEL_VOCABULARY,
    ROWS_OF_IMAGE,
    Augmentation,
    CodeEncoding,
    PixelEncoding,
    code_vocabulary,
)
from data_prep.image_sources import ImageSource
from data_prep.pipeline import Counts, OutputOptions, RowFormat, check_shard_size, prepare_job
from data_prep.sources import SPLITS, UnitSize, units_of
from data_prep.units import Encoding, Rejected, Unit
from pgm_scale.data.manifest import (
    TOKENIZER_NAME,
    VQ_WEIGHTS_NAME,
    DatasetManifest,
    ImageContent,
    token_dtype_for,
)
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes

if TYPE_CHECKING:
    from pgm_scale.vq_tokenizer import VQTokenizer

CORRUPT_NAME = "corrupt.jsonl"  # in the output folder, if any image was left out
UNIT_ROWS = 64  # or a batch, if that is more; 12 MB of pixels at 256 x 256
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class ImageOptions(OutputOptions):
    """`size` in pixels a side; `vq_path` None for rows of pixels, else whatever `VQTokenizer.load` opens."""

    size: int = 256
    channels: int = 3
    augmentation: Augmentation = "none"
    max_corrupt_share: float = 0.01
    vq_path: Path | None = None
    batch: int = 16
    device: str = "cpu"

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.size < 1:
            problems.append(f"--size {self.size} is below 1")
        if self.batch < 1:
            problems.append(f"--batch {self.batch} is below 1")
        if not 0 <= self.max_corrupt_share <= 1:
            problems.append(f"--max-corrupt-share {self.max_corrupt_share} is not between 0 and 1")
        return problems


def prepare_images(source: ImageSource, options: ImageOptions) -> list[DatasetManifest]:
    """`prepare_job` of the source's images; `read_rejected` says which were left out.

    Raises:
        UserError: also bad options, all at once, and too many unreadable images.
    """
    problems = options.problems()
    if problems:
        raise UserError("; ".join(problems))
    job = PixelJob(source, options) if options.vq_path is None else CodeJob(source, options, options.vq_path)
    rows = job.row_format(options.output)
    check_shard_size(options, rows.length_tokens, rows.token_dtype, labelled=True)
    return prepare_job(job, options)


def read_rejected(output: Path) -> list[Rejected]:
    """The images that a finished preparation left out."""
    path = output / CORRUPT_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Rejected(entry["name"], entry["reason"]) for entry in map(json.loads, lines)]


def named(rejected: list[Rejected]) -> str:
    """The first few, for a line; bytes of a file name that are not UTF-8 are written out."""
    first = [f"{entry.name} ({entry.reason})" for entry in rejected[:_NAMED]]
    more = len(rejected) - len(first)
    line = ", ".join(first) + (f" and {more} more" if more else "")
    return line.encode("utf-8", "backslashreplace").decode()


class PixelJob:
    """Rows of pixels, by which a VQ tokenizer is trained."""

    activity = "reading images"
    tokenizer_files: tuple[str, ...] = (TOKENIZER_NAME,)

    def __init__(self, source: ImageSource, options: ImageOptions) -> None:
        self._source = source
        self._options = options
        self._pixels = PixelEncoding(options.size, options.channels, options.augmentation)
        rows = max(UNIT_ROWS, options.batch)
        self._unit = UnitSize(documents=max(1, rows // ROWS_OF_IMAGE[options.augmentation]))

    def plan(self) -> dict[str, Any]:
        return {
            "tokenizer": "pixels",
            "size": self._options.size,
            "channels": self._pixels.channels,
            "augmentation": self._options.augmentation,
            "unit": self._unit.documents,
            "images": self._source.describe(),
        }

    def make_tokenizer(self, folder: Path, progress: Progress) -> None:
        atomic_write_bytes(folder / TOKENIZER_NAME, b'{"kind": "pixels"}\n')

    def encoding(self, folder: Path) -> Encoding:
        return self._pixels

    def total_documents(self) -> int | None:
        return self._source.total()

    def units(self) -> Iterator[Unit]:
        return units_of(self._source.images(), self._unit)

    def check(self, counts: Counts) -> None:
        rejected = [(split, entry) for split in SPLITS for unit in counts[split] for entry in unit.rejected]
        good = {split: sum(unit.documents for unit in counts[split]) for split in SPLITS}
        output, most = self._options.output, self._options.max_corrupt_share
        (output / CORRUPT_NAME).unlink(missing_ok=True)
        if rejected:
            lines = [
                json.dumps({"split": split, "name": entry.name, "reason": entry.reason}) + "\n"
                for split, entry in rejected
            ]
            atomic_write_bytes(output / CORRUPT_NAME, "".join(lines).encode())
            total = sum(good.values()) + len(rejected)
            if len(rejected) > most * total:
                raise UserError(
                    f"{len(rejected)} of {total} images cannot be read, more than --max-corrupt-share {most}: "
                    f"{named([entry for _, entry in rejected])}; {output / CORRUPT_NAME} names all: mend or remove "
                    "them, or allow more"
                )
        empty = [split for split in SPLITS if not good[split]]
        if empty:
            raise UserError(
                f"the {empty[0]} split has no image; give more of them, or another share for validation"
            )

    def row_format(self, folder: Path) -> RowFormat:
        size, channels = self._options.size, self._pixels.channels
        images = ImageContent("pixels", size, channels, size, self._source.class_names)
        return RowFormat(PIXEL_VOCABULARY, size**2 * channels, "uint8", "image", images)


class CodeJob(PixelJob):
    """Rows of BOS and codes."""

    activity = "encoding images"
    tokenizer_files = (TOKENIZER_NAME, VQ_WEIGHTS_NAME)

    def __init__(self, source: ImageSource, options: ImageOptions, vq_path: Path) -> None:
        super().__init__(source, options)
        self._vq_path = vq_path
        if options.size % self._vq.downsampling:
            raise UserError(
                f"--size {options.size} is not divisible by {self._vq.downsampling}, the pixels a code of {vq_path}"
            )
        self._pixels = PixelEncoding(options.size, self._vq.config.image_channels, options.augmentation)

    def plan(self) -> dict[str, Any]:
        # Rounding differs between batches and devices, and may tip two codes that are equally near.
        computed = {"batch": self._options.batch, "device": self._options.device}
        return super().plan() | {"tokenizer": self._vq.sha256} | computed

    def make_tokenizer(self, folder: Path, progress: Progress) -> None:
        self._vq.save(folder)

    def encoding(self, folder: Path) -> Encoding:
        return CodeEncoding(self._pixels, folder, self._options.batch, self._options.device)

    def row_format(self, folder: Path) -> RowFormat:
        size, config = self._options.size, self._vq.config
        grid_side = size // self._vq.downsampling
        vocabulary = code_vocabulary(config.codebook_size)
        images = ImageContent("codes", size, config.image_channels, grid_side, self._source.class_names)
        dtype = token_dtype_for(vocabulary.size)
        return RowFormat(vocabulary, 1 + grid_side**2, dtype, "image", images)

    @cached_property
    def _vq(self) -> VQTokenizer:
        from pgm_scale.vq_tokenizer import VQTokenizer

        return VQTokenizer.load(self._vq_path, "cpu")
