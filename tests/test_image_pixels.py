"""Decoding and cropping against torchvision's transforms and plain arithmetic."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgm_scale import image_pixels
from pgm_scale.image_pixels import UnreadableImage, crops, decode, header_size
from tests.data_prep.pictures import encoded, picture, published, sixteen_bits


@pytest.mark.parametrize("size", [16, 33, 64])
@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (33, 33), (100, 7), (1, 1), (257, 129)])
def test_crop_as_published(shape: tuple[int, int], size: int) -> None:
    image = picture(3, *shape)
    (square_HWC,) = crops(image, size)
    np.testing.assert_array_equal(square_HWC, published(image, size))


def test_ten_crops() -> None:
    image = picture(4, 50, 40)
    resized = image.resize((55, 44), Image.Resampling.BILINEAR)
    pixels_HWC = np.asarray(resized)
    expected = [pixels_HWC[t : t + 40, x : x + 40] for t, x in [(0, 0), (0, 15), (4, 0), (4, 15), (2, 8)]]
    expected += [
        np.asarray(Image.fromarray(square).transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for square in expected
    ]
    found = crops(image, 40, ten_crop=True)
    assert len(found) == 10
    for square_HWC, expected_HWC in zip(found, expected, strict=True):
        np.testing.assert_array_equal(square_HWC, expected_HWC)


def test_a_very_long_line_stays_small() -> None:
    """Its whole would be 32 x 960,000 pixels."""
    line = Image.fromarray(np.repeat(np.arange(30000)[None, :, None] % 256, 3, 2).astype(np.uint8))
    (square_HWC,) = crops(line, 32)
    middle = Image.fromarray(np.asarray(line)[:, 14992:15008])
    np.testing.assert_array_equal(square_HWC, published(middle, 32))


def pixels(content: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(decode(content, channels)).astype(int)


def test_sixteen_bits_are_scaled() -> None:
    values_HW = sixteen_bits()
    expected_HW = np.round(values_HW / 65535 * 255)
    for content in (encoded(Image.fromarray(values_HW), "PNG"), encoded(Image.fromarray(values_HW), "TIFF")):
        np.testing.assert_array_equal(pixels(content, 1), expected_HW)
        np.testing.assert_array_equal(pixels(content), np.repeat(expected_HW[..., None], 3, 2))
    wide = Image.fromarray(values_HW.astype(np.int32))
    with pytest.raises(UnreadableImage, match="numbers without a range"):
        decode(encoded(wide, "TIFF"), 3)


def test_transparency_is_on_white() -> None:
    image = picture(6, mode="RGBA")
    channels = np.asarray(image).astype(float)
    alpha = channels[..., 3:] / 255
    expected = channels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(encoded(image, "PNG")) - expected).max() <= 1
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    content = encoded(palette, "PNG", transparency=0)
    assert pixels(content).tolist() == [[[255] * 3, [200, 100, 50]], [[200, 100, 50], [255] * 3]]
    assert pixels(encoded(palette, "GIF")).tolist()[0] == [[10, 20, 30], [200, 100, 50]]


def test_cmyk_and_gray() -> None:
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(pixels(encoded(ink, quality=100))[4, 4] - [0, 255, 255]).max() <= 3
    gray = picture(7, mode="L")
    np.testing.assert_array_equal(pixels(encoded(gray, "PNG"))[..., 1], np.asarray(gray))
    np.testing.assert_array_equal(pixels(encoded(gray, "PNG"), 1), np.asarray(gray))
    assert pixels(encoded(Image.new("1", (2, 2), 1), "PNG"), 1).tolist() == [[255, 255], [255, 255]]
    red = encoded(Image.new("RGB", (1, 1), (255, 0, 0)), "PNG")
    assert pixels(red, 1).tolist() == [[76]]  # 0.299 of 255, ITU-R 601


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation: int) -> None:
    """The definition: where row 0 and column 0 of the stored image are to be seen (EXIF 2.3, tag 274)."""
    seen = np.asarray(picture(8))
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: seen.transpose(1, 0, 2)[::-1],  # row 0 is the right side, column 0 the top
        7: seen.transpose(1, 0, 2)[::-1, ::-1],
        8: seen.transpose(1, 0, 2)[:, ::-1],  # row 0 is the left side, column 0 the bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(content), seen)


def png_of(width: int, height: int) -> bytes:
    """A few bytes that claim to be of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


WHOLE = encoded(picture(9, 200, 200), quality=95)


@pytest.mark.fault(54)
@pytest.mark.fault(59)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"just text, named .jpg", "not an image of a known kind"),
        (WHOLE[:10], "not an image|Truncated"),
        (WHOLE[: len(WHOLE) // 2], "truncated"),
        (WHOLE[:-600], "truncated"),
        (encoded(picture(9), "PNG")[:-300], "truncated|broken"),
        (png_of(20_000, 20_000), "400000000 pixels"),
        (png_of(9_500, 9_500), "9500 x 9500 pixels, more than 89478485"),
        (png_of(64, 64), "truncated"),
        (encoded(picture(9), "EPS"), "not an image of a known kind"),  # Pillow would run a program for it
    ],
)
def test_unreadable_images_say_why_and_always_the_same(content: bytes, reason: str) -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            decode(content, 3)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_header_tells_the_size(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(encoded(picture(9, 20, 30), kind))
    assert header_size(tmp_path / "a") == decode((tmp_path / "a").read_bytes(), 3).size
    for content in (b"", b"no image", encoded(picture(9), "EPS")):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(UnreadableImage, match="not an image of a known kind"):
            header_size(tmp_path / "a")
    with pytest.raises(UnreadableImage, match="No such file"):
        header_size(tmp_path / "absent")


@pytest.mark.fault(54)
def test_a_file_of_absurd_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_pixels, "LARGEST_FILE_BYTES", 100)
    with pytest.raises(UnreadableImage, match=r"\d+ bytes, more than 100"):
        decode(WHOLE, 3)
