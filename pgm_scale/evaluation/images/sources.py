"""Where images come from: prepared splits, image folders, sampled codes, and a tokenizer's reconstructions."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from pgm_scale.data.loader import TokenLoader
from pgm_scale.data.manifest import MANIFEST_NAME, ImageContent
from pgm_scale.data.order import GlobalOrder
from pgm_scale.data.storage import SplitStorage, is_remote
from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.chunks import ChunkFolder, Columns
from pgm_scale.files import sha256_file
from pgm_scale.image_pixels import SUFFIXES, UnreadableImage, decode, header_size
from pgm_scale.vq_tokenizer import VQTokenizer

Read = TypeVar("Read")

_READ_ROWS = 32  # at a time: the loader gives 8 bytes a token


@dataclass(frozen=True)
class Images:
    """uint8 pixels, and what else is known of each image: `labels`, `squared_error` (0 to 1), `decoding_s`."""

    pixels_BHWC: np.ndarray
    columns: Columns


class ImageSource(Protocol):
    """Images by number, always the same for a number.

    Attributes:
        name: where they are, for people.
        identity: what they are, in plain JSON values: equal identities are equal images.
    """

    name: str
    count: int
    identity: dict[str, Any]

    def read(self, numbers: range) -> Images: ...


class SplitImages:
    """The rows of a split in their stored order, of pixels, or of codes, which the tokenizer decodes."""

    def __init__(self, split: str, content: ImageContent, storage: SplitStorage, vq: VQTokenizer | None):
        self.name = split
        self.count = storage.manifest.rows
        self.sha256 = hashlib.sha256(storage.manifest.to_json().encode()).hexdigest()
        self.identity = {"split_sha256": self.sha256}  # a split of codes names its tokenizer
        self.class_names = content.class_names
        self.content: Literal["pixels", "codes"] = content.tokens
        self._image = content
        self.shape_HWC = (content.side_pixels, content.side_pixels, content.channels)
        self._vq = vq
        order = GlobalOrder(storage.manifest.rows_per_shard, 0, 1, shuffle=False)
        self._loader = TokenLoader(storage, order)

    def read(self, numbers: range) -> Images:
        parts = [self._read(list(numbers[i : i + _READ_ROWS])) for i in range(0, len(numbers), _READ_ROWS)]
        pixels = np.concatenate([pixels for pixels, _ in parts])
        return Images(pixels, {"labels": np.concatenate([labels for _, labels in parts])})

    def labels(self, numbers: Sequence[int]) -> np.ndarray:
        """int64 classes of these rows."""
        parts = [numbers[i : i + _READ_ROWS] for i in range(0, len(numbers), _READ_ROWS)]
        return np.concatenate([self._rows(part)[1] for part in parts])

    def has_two_classes(self) -> bool:
        """Read as far as the first row of another class."""
        numbers = range(self.count)
        first = self.labels([0])
        return any((self.labels(numbers[i : i + _READ_ROWS]) != first).any() for i in numbers[::_READ_ROWS])

    def _rows(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        batch = self._loader.read(np.array(numbers))
        assert batch.labels_B is not None
        return batch.tokens_BL, batch.labels_B

    def _read(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        tokens_BL, labels_B = self._rows(numbers)
        if self._vq is not None:
            return self._vq.decode(tokens_BL[:, 1:]), labels_B
        side, channels = self._image.side_pixels, self._image.channels
        return tokens_BL.astype(np.uint8).reshape(-1, side, side, channels), labels_B


class FolderImages:
    """The image files of a folder and its subfolders by name: RGB, squares of one size, taken as they are."""

    content: Literal["images"] = "images"

    def __init__(self, folder: str) -> None:
        """Opens every file as far as its size stands in it, so that a wrong one is found before long work."""
        root = Path(folder)
        self._files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self._files:
            raise UserError(f"{folder}: no images in it; give a split folder or a folder of images")
        self._side = _checked(self._files[0], header_size)[0]
        for path in self._files:
            self._check_square(path, *_checked(path, header_size))
        hashes = [(path.relative_to(root).as_posix(), sha256_file(path)) for path in self._files]
        self.name = folder
        self.count = len(self._files)
        self.sha256 = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
        self.identity = {"folder_sha256": self.sha256}
        self.shape_HWC = (self._side, self._side, 3)

    def read(self, numbers: range) -> Images:
        return Images(np.stack([self._pixels(self._files[number]) for number in numbers]), {})

    def _pixels(self, path: Path) -> np.ndarray:
        pixels_HWC = np.asarray(_checked(path, lambda path: decode(path.read_bytes(), channels=3)))
        self._check_square(path, pixels_HWC.shape[1], pixels_HWC.shape[0])
        return pixels_HWC

    def _check_square(self, path: Path, width: int, height: int) -> None:
        if not height == width == self._side:
            raise UserError(
                f"{path}: {width} x {height} pixels, but the folder's images must be squares of one size "
                f"({self._side}); crop them with `pgm-scale prepare images`"
            )


def _checked(path: Path, read: Callable[[Path], Read]) -> Read:
    try:
        return read(path)
    except (OSError, UnreadableImage) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); remove it") from None


class SampledImages:
    """The images of sampled codes, which lie in a chunk folder."""

    def __init__(self, codes: ChunkFolder, identity: dict[str, Any], vq: VQTokenizer, batch_images: int):
        self.name = str(codes.path)
        self.count = codes.chunks[-1].stop
        self.identity = {"codes": identity}
        self._codes, self._vq, self._batch_images = codes, vq, batch_images

    def read(self, numbers: range) -> Images:
        """`numbers` is a chunk of the codes."""
        columns = self._codes.read(numbers)
        start_s = time.perf_counter()
        pixels_BHWC = self._vq.decode(columns["codes"], self._batch_images)
        seconds_B = np.full(len(numbers), (time.perf_counter() - start_s) / len(numbers))
        sampling_B = columns["sampling_s"]
        return Images(pixels_BHWC, {"labels": columns["labels"], "seconds": sampling_B + seconds_B})


class ReconstructedImages:
    """What a tokenizer makes of other images."""

    def __init__(self, originals: ImageSource, vq: VQTokenizer, batch_images: int) -> None:
        self.name = f"reconstruction of {originals.name}"
        self.count = originals.count
        self.identity = {"originals": originals.identity, "vq_sha256": vq.sha256}
        self._originals, self._vq, self._batch_images = originals, vq, batch_images

    def read(self, numbers: range) -> Images:
        images = self._originals.read(numbers)
        codes_BL = self._vq.encode(images.pixels_BHWC, self._batch_images)
        decoded_BHWC = self._vq.decode(codes_BL, self._batch_images)
        error_BHWC = (images.pixels_BHWC.astype(np.float32) - decoded_BHWC) / 255.0
        squared_B = np.square(error_BHWC).mean(axis=(1, 2, 3), dtype=np.float64)
        return Images(decoded_BHWC, images.columns | {"squared_error": squared_B})


def open_images(
    path: str, vq: VQTokenizer | None, cache_folder: Path | None = None
) -> SplitImages | FolderImages:
    """A split of pixels, a split of codes of this tokenizer, or a folder of image files.

    Args:
        vq: None where codes will not do.
        cache_folder: for what is fetched of a remote split.

    Raises:
        UserError: nothing of these, or codes of another tokenizer.
    """
    if not is_remote(path) and not (Path(path) / MANIFEST_NAME).exists():
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such folder; give a split folder or a folder of images")
        return FolderImages(path)
    storage = SplitStorage(path, cache_folder)
    content = storage.manifest.images
    if content is None:
        raise UserError(f"{path} is a split of text; give one of images, written by `pgm-scale prepare`")
    if content.tokens == "pixels":
        return SplitImages(path, content, storage, None)
    if vq is None:
        raise UserError(
            f"{path} is a split of codes, and --reconstruction needs the original images; "
            "give their split of pixels, or a folder of images"
        )
    if vq.sha256 != storage.manifest.tokenizer_sha256:
        raise UserError(
            f"{path} holds codes of another VQ tokenizer; give a split of its pixels, or its --vq"
        )
    return SplitImages(path, content, storage, vq)
