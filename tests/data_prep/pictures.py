"""Small images, files of them, and the folder of a careless collector."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A smooth gradient with noise, so that neither resizing nor a JPEG makes it flat."""
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "CMYK": 4, "RGBA": 4, "L": 1}[mode]
    rows, columns = np.mgrid[0:height, 0:width]
    phases = rng.uniform(0, 6, (channels, 2))
    waves = [128 + 90 * np.sin(columns / 5 + a) * np.cos(rows / 4 + b) for a, b in phases]
    values = np.stack(waves, -1) + rng.normal(0, 8, (height, width, channels))
    pixels = values.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode=None if mode != "CMYK" else "CMYK")


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def sixteen_bits(seed: int = 5) -> np.ndarray:
    """Half of it above 255, where a careless conversion clips."""
    return np.random.default_rng(seed).integers(0, 65536, (25, 35)).astype(np.uint16)


def write_folder(folder: Path, images: int = 30, classes: tuple[str, ...] = ("ant", "bee", "cow")) -> Path:
    for number in range(images):
        path = folder / classes[number % len(classes)] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number, 24 + number % 9, 20 + number % 7)))
    return folder


def write_careless_folder(folder: Path) -> dict[str, Image.Image]:
    """Good images of every odd kind, and bad ones; returns the good ones as RGB, before resizing, by name."""
    good = {f"ant/{n}.jpg": encoded(picture(n)) for n in range(6)}
    good["ant/cmyk.jpg"] = encoded(picture(20, mode="CMYK"))
    good["bee/deep.png"] = encoded(Image.fromarray(sixteen_bits()), "PNG")
    good["bee/dot.png"] = encoded(Image.new("RGB", (1, 1), (200, 30, 90)), "PNG")
    good["bee/upper.JPEG"] = encoded(picture(21, 30, 50), "PNG")  # as one file of ImageNet
    whole = encoded(picture(22, 200, 200), quality=95)
    bad = {f"bee/cut{n}.jpg": whole[: len(whole) * n // 4] for n in (1, 2, 3)}
    bad |= {"ant/text.jpg": b"This is not a picture.\n", "ant/empty.png": b""}
    for name, content in {**good, **bad}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    expected = {name: Image.open(io.BytesIO(content)).convert("RGB") for name, content in good.items()}
    gray = np.round(sixteen_bits() / 65535 * 255).astype(np.uint8)
    expected["bee/deep.png"] = Image.fromarray(gray).convert("RGB")
    return expected


CARELESS_BAD = {"bee/cut1.jpg", "bee/cut2.jpg", "bee/cut3.jpg", "ant/text.jpg", "ant/empty.png"}


def published(image: Image.Image, size: int) -> np.ndarray:
    """Resize(size) and CenterCrop(size) by torchvision (FACTS 2.1), uint8 [size, size, 3]."""
    from torchvision.transforms import CenterCrop, Resize

    return np.array(CenterCrop(size)(Resize(size)(image)))
