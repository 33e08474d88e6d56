"""The bytes of an image file to square crops of 8-bit pixels, by Pillow alone.

Whatever a decoder stumbles over becomes `UnreadableImage`: one bad file must not end a run over a million.
Suffixes: H row, W column, C channel.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LARGEST_FILE_BYTES = 1 << 28
LARGEST_PIXELS = 89_478_485  # 256 MiB of RGB; a small file can claim to be of any size
# By content, whatever the suffix. Not all that Pillow knows: it would run Ghostscript for an EPS.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_LONGEST_ASPECT = 16
_TEN_CROP_MARGIN = 1.1  # LlamaGen's: the crops differ in 10% of a side, or more along the longer one

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """Says why in a few words, the same on every run."""


def decode(content: bytes, channels: int) -> Image.Image:
    """The image as people see it: upright, RGB (or with one channel gray), 8 bits, on white.

    Raises:
        UnreadableImage: no image, a damaged one, or one that is too large.
    """
    if not content:
        raise UnreadableImage("an empty file")
    if len(content) > LARGEST_FILE_BYTES:
        raise UnreadableImage(f"{len(content)} bytes, more than {LARGEST_FILE_BYTES}")
    with _decoding(), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        if image.width * image.height > LARGEST_PIXELS:
            raise UnreadableImage(f"{image.width} x {image.height} pixels, more than {LARGEST_PIXELS}")
        image.load()
        return _upright(image, _converted(image, "RGB" if channels == 3 else "L"))


def header_size(path: Path) -> tuple[int, int]:
    """Width and height as the first bytes of an image file tell them; what follows may still be damaged.

    Raises:
        UnreadableImage: no image, or a file that cannot be read.
    """
    with _decoding(), Image.open(path, formats=_FORMATS) as image:
        return image.size


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever Pillow stumbles over becomes an `UnreadableImage`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes, which are checked apart
            yield
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a known kind") from None
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # the decoders share no base class
        reason = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
        raise UnreadableImage(reason[:200] or type(error).__name__) from None


def crops(image: Image.Image, size: int, ten_crop: bool = False) -> list[np.ndarray]:
    """Squares of `size` pixels, uint8 [H, W, C].

    The shorter side is resized to `size` (bilinear with antialiasing, torchvision's default) and the centre cut
    out (FACTS 2.1). With `ten_crop` it is resized to 1.1 times that, and the four corners and the centre are cut
    out, and then their mirror images.
    """
    resized = _resized(image, int(size * _TEN_CROP_MARGIN) if ten_crop else size)
    right, bottom = resized.width - size, resized.height - size
    centre = (round(right / 2), round(bottom / 2))
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)] if ten_crop else []
    cut = [resized.crop((left, top, left + size, top + size)) for left, top in (*corners, centre)]
    squares = [np.array(square).reshape(size, size, -1) for square in cut]
    return squares + [mirrored(square_HWC) for square_HWC in squares] if ten_crop else squares


def mirrored(square_HWC: np.ndarray) -> np.ndarray:
    return square_HWC[:, ::-1]


def _resized(image: Image.Image, shorter: int) -> Image.Image:
    """With `shorter` pixels along the shorter side. Of a very long image only the middle: a line of 1 x 10,000
    pixels would become as many megapixels, and is cropped anyway."""
    longest = _LONGEST_ASPECT * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    if width <= height:
        target = (shorter, int(shorter * height / width))
    else:
        target = (int(shorter * width / height), shorter)
    return image.resize(target, Image.Resampling.BILINEAR)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values_HW = np.asarray(image, np.uint32)  # of 16 bits; Pillow would clip them at 255
        image = Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableImage(f"mode {image.mode}: numbers without a range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB").convert(mode) if image.mode != mode else image.copy()


def _upright(image: Image.Image, converted: Image.Image) -> Image.Image:
    """`converted`, turned as the metadata of `image` says; damaged metadata says nothing."""
    try:
        transpose = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the parsers share no base class
        transpose = None
    return converted if transpose is None else converted.transpose(transpose)
