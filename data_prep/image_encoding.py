"""Images to rows of pixels or of VQ codes, in worker processes; with a GPU, the codes in the main process.

Suffixes: R rows, L tokens of a row, H pixel row, W pixel column, C channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.image_sources import ImageFile
from data_prep.sources import TRAIN
from data_prep.units import Rejected, Unit, UnitRows
from pgm_scale.data.manifest import Vocabulary, token_dtype_for
from pgm_scale.image_pixels import UnreadableImage, crops, decode, mirrored

Augmentation = Literal["none", "flip", "ten-crop"]
ROWS_OF_IMAGE: dict[Augmentation, int] = {"none": 1, "flip": 2, "ten-crop": 10}
PIXEL_VOCABULARY = Vocabulary(size=256, mask_id=0, bos_id=0, eos_id=0, pad_id=None)


def code_vocabulary(codebook_size: int) -> Vocabulary:
    """The codes, then the mask, then BOS (FACTS 2.1)."""
    mask, bos = codebook_size, codebook_size + 1
    return Vocabulary(size=codebook_size + 2, mask_id=mask, bos_id=bos, eos_id=bos, pad_id=None)


@dataclass(frozen=True)
class PixelEncoding:
    """Rows are the pixels of square crops; `augmentation` is for training images."""

    size: int
    channels: int
    augmentation: Augmentation = "none"

    def start(self) -> Callable[[Unit], UnitRows]:
        return self.encode

    def finisher(self) -> None:
        return None

    def encode(self, unit: Unit) -> UnitRows:
        squares: list[np.ndarray] = []
        labels: list[int] = []
        rejected: list[Rejected] = []
        for image in unit.documents:
            try:
                found = self._squares(image, self.augmentation if unit.split == TRAIN else "none")
            except UnreadableImage as error:
                rejected.append(Rejected(image.name, str(error)))
                continue
            squares += found
            labels += [image.label] * len(found)
        tokens_RL = np.stack(squares) if squares else np.empty((0, self.size, self.size, self.channels))
        return UnitRows(
            len(unit.documents) - len(rejected),
            tokens_RL.astype(np.uint8).reshape(len(squares), self.size**2 * self.channels),
            np.full(len(squares), self.size**2 * self.channels, np.uint32),
            np.array(labels, np.uint32),
            tuple(rejected),
        )

    def _squares(self, image: ImageFile, augmentation: Augmentation) -> list[np.ndarray]:
        squares = crops(decode(image.read(), self.channels), self.size, augmentation == "ten-crop")
        return (
            squares + [mirrored(square_HWC) for square_HWC in squares] if augmentation == "flip" else squares
        )


@dataclass(frozen=True)
class CodeEncoding:
    """Rows are BOS and the codes of the VQ tokenizer in `folder`, `batch` images a forward pass on `device`."""

    pixels: PixelEncoding
    folder: Path
    batch: int
    device: str

    def start(self) -> Callable[[Unit], UnitRows]:
        if self.device != "cpu":
            return self.pixels.encode
        import torch

        # The sum of a convolution depends on the number of threads in the last bits, and the nearest code with
        # it: one thread a process keeps the bytes the same for any number of workers.
        torch.set_num_threads(1)
        to_codes = self._to_codes()
        return lambda unit: to_codes(self.pixels.encode(unit))

    def finisher(self) -> Callable[[UnitRows], UnitRows] | None:
        return None if self.device == "cpu" else self._to_codes()

    def _to_codes(self) -> Callable[[UnitRows], UnitRows]:
        from pgm_scale.vq_tokenizer import VQTokenizer

        tokenizer = VQTokenizer.load(self.folder, self.device)
        vocabulary = code_vocabulary(tokenizer.config.codebook_size)
        size, channels = self.pixels.size, self.pixels.channels

        def to_codes(rows: UnitRows) -> UnitRows:
            pixels_RHWC = rows.tokens_RL.reshape(-1, size, size, channels)
            codes_RL = tokenizer.encode(pixels_RHWC, batch_images=self.batch)
            length = 1 + codes_RL.shape[1]
            tokens_RL = np.full((len(codes_RL), length), vocabulary.bos_id, token_dtype_for(vocabulary.size))
            tokens_RL[:, 1:] = codes_RL
            lengths_R = np.full(len(codes_RL), length, np.uint32)
            return replace(rows, tokens_RL=tokens_RL, valid_lengths_R=lengths_R)

        return to_codes
