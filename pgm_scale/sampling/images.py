"""Between images and their codes: what of an image is known, and generated codes as PNG files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, read_bounded
from pgm_scale.image_pixels import UnreadableImage, crops, decode
from pgm_scale.sampling import UNKNOWN
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
        image = decode(read_bounded(path), channels)
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
    _check_box("--box", box, side_pixels)
    x0, y0, x1, y1 = box
    cell = side_pixels // grid_side
    touching = np.zeros((grid_side, grid_side), bool)
    touching[y0 // cell : -(-y1 // cell), x0 // cell : -(-x1 // cell)] = True
    return touching.reshape(-1)


def codes_within(box: Box, side_pixels: int, grid_side: int) -> np.ndarray:
    """bool [grid_side**2]: the codes whose cells lie wholly in the box (x0, y0, x1, y1), x1 and y1 not in it.

    Raises:
        UserError: the box is empty, reaches out of the image, or holds no whole cell.
    """
    _check_box("--keep-box", box, side_pixels)
    x0, y0, x1, y1 = box
    cell = side_pixels // grid_side
    within = np.zeros((grid_side, grid_side), bool)
    within[-(-y0 // cell) : y1 // cell, -(-x0 // cell) : x1 // cell] = True
    if not within.any():
        raise UserError(
            f"--keep-box {x0},{y0},{x1},{y1} holds no whole cell of a code, {cell} x {cell} pixels from a multiple "
            f"of {cell} on; enlarge it"
        )
    return within.reshape(-1)


def known_outside(pixels_HWC: np.ndarray, box: Box, vq: VQTokenizer, bos_id: int) -> np.ndarray:
    """`known_BL` [1, L] of an image of which the box is to be generated."""
    codes_1K = vq.encode(pixels_HWC[None])
    touching_K = codes_touching(box, len(pixels_HWC), math.isqrt(codes_1K.shape[1]))
    return np.concatenate([[[bos_id]], np.where(touching_K, UNKNOWN, codes_1K)], axis=1)


def known_inside(pixels_HWC: np.ndarray, box: Box, vq: VQTokenizer, bos_id: int) -> np.ndarray:
    """`known_BL` [1, L] of an image of which all but the box is to be generated."""
    codes_1K = vq.encode(pixels_HWC[None])
    within_K = codes_within(box, len(pixels_HWC), math.isqrt(codes_1K.shape[1]))
    return np.concatenate([[[bos_id]], np.where(within_K, codes_1K, UNKNOWN)], axis=1)


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


def _check_box(option: str, box: Box, side_pixels: int) -> None:
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= side_pixels and 0 <= y0 < y1 <= side_pixels):
        raise UserError(
            f"{option} {x0},{y0},{x1},{y1} must hold 0 <= x0 < x1 <= {side_pixels}, and y likewise: pixels of the "
            f"image when cropped to {side_pixels} x {side_pixels}"
        )


def _write(path: Path, image_HWC: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC).save(content, "PNG")
    try:
        atomic_write_bytes(path, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from None
