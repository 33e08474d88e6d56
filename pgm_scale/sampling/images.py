"""Between images and their codes: what of an image is known, and generated codes as PNG files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from pgm_scale.config import RunConfig
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes
from pgm_scale.image_pixels import UnreadableImage, crops, decode
from pgm_scale.run_folder import RunFolder, RunIdentity
from pgm_scale.sampling import UNKNOWN, class_count, fitting_sampler, known_prefixes, sample
from pgm_scale.vq_tokenizer import VQTokenizer

Box = tuple[int, int, int, int]

_GAP_PIXELS = 2  # between the images of a grid
_SEEN_PIXELS = 64  # a side


def read_image(path: str | Path, side: int, channels: int) -> np.ndarray:
    """uint8 [side, side, channels] of an image file: its shorter side scaled to `side`, and the centre cut out.

    Raises:
        UserError: not an image that can be read.
    """
    try:
        image = decode(Path(path).read_bytes(), channels)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an image file") from None
    except UnreadableImage as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); give another") from None
    return crops(image, side)[0]


def codes_touching(box: Box, side_pixels: int, grid_side: int) -> np.ndarray:
    """bool [grid_side**2]: the codes whose cells share a pixel with the box (x0, y0, x1, y1), x1 and y1 not in it.

    Raises:
        UserError: the box is empty or reaches out of the image.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= side_pixels and 0 <= y0 < y1 <= side_pixels):
        raise UserError(
            f"--box {x0},{y0},{x1},{y1} must hold 0 <= x0 < x1 <= {side_pixels}, and y likewise: pixels of the "
            f"image when cropped to {side_pixels} x {side_pixels}"
        )
    cell = side_pixels // grid_side
    touching = np.zeros((grid_side, grid_side), bool)
    touching[y0 // cell : -(-y1 // cell), x0 // cell : -(-x1 // cell)] = True
    return touching.reshape(-1)


def known_outside(pixels_HWC: np.ndarray, box: Box, vq: VQTokenizer, bos_id: int) -> np.ndarray:
    """`known_BL` [1, L] of an image of which the box is to be generated."""
    codes_1K = vq.encode(pixels_HWC[None])
    touching_K = codes_touching(box, len(pixels_HWC), math.isqrt(codes_1K.shape[1]))
    return np.concatenate([[[bos_id]], np.where(touching_K, UNKNOWN, codes_1K)], axis=1)


def decode_images(vq: VQTokenizer, tokens_BL: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, C] of rows of BOS and codes."""
    return vq.decode(tokens_BL[:, 1:])


def image_grid(images_BHWC: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [H', W', C]: the images in rows of `columns`, with white between them and where none is left.

    Small images are enlarged by a whole factor, so that one can see what they show.
    """
    factor = max(1, _SEEN_PIXELS // images_BHWC.shape[1])
    images_BHWC = images_BHWC.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images_BHWC.shape
    rows, columns = -(-count // columns), min(columns, count)
    tile_rows, tile_columns = height + _GAP_PIXELS, width + _GAP_PIXELS
    tiles = np.full((rows * columns, tile_rows, tile_columns, channels), 255, np.uint8)
    tiles[:count, :height, :width] = images_BHWC
    tiles = tiles.reshape(rows, columns, tile_rows, tile_columns, channels).swapaxes(1, 2)
    grid = tiles.reshape(rows * tile_rows, columns * tile_columns, channels)
    return grid[:-_GAP_PIXELS, :-_GAP_PIXELS]


def write_image_grid(path: str | Path, images_BHWC: np.ndarray, columns: int) -> None:
    """Write `image_grid` as a PNG that is either whole or not there.

    Raises:
        UserError: the file cannot be written.
    """
    _write(Path(path), image_grid(images_BHWC, columns))


def write_image_files(folder: str | Path, images_BHWC: np.ndarray, labels_B: np.ndarray) -> None:
    """One PNG an image, `<number>_class<label>.png`, in a folder that is made if need be.

    Raises:
        UserError: the folder or a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from None
    for number, (image_HWC, label) in enumerate(zip(images_BHWC, labels_B, strict=True)):
        _write(folder / f"{number:06d}_class{label}.png", image_HWC)


def write_validation_images(
    model: nn.Module,
    config: RunConfig,
    identity: RunIdentity,
    folder: RunFolder,
    step: int,
    device: torch.device,
    writes: bool,
) -> None:
    """`validation.samples` images of the classes in turn, as the grid `samples/step_<step>.png` of a run of codes.

    Collective: all ranks generate the same images (ZeRO-3 needs them all), the one that `writes` decodes them.
    """
    count, length = config.validation.samples, identity.length_tokens
    labels_B = np.arange(count) % class_count(model)
    result = sample(
        model,
        identity.vocabulary,
        length,
        fitting_sampler(config.sampler, model),
        known_BL=known_prefixes([[]] * count, length, identity.vocabulary.bos_id),
        labels_B=labels_B,
        seed=config.training.seed,
        batch_sequences=count,
        device=device,
    )
    if writes:
        folder.samples_path.mkdir(exist_ok=True)
        images_BHWC = decode_images(VQTokenizer.load(folder.path, device), result.tokens_BL)
        write_image_grid(
            folder.samples_path / f"step_{step:08d}.png", images_BHWC, math.ceil(math.sqrt(count))
        )


def _write(path: Path, image_HWC: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC).save(content, "PNG")
    try:
        atomic_write_bytes(path, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from None
