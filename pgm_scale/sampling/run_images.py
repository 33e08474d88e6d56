"""Images of a run: their classes, what is known of them, and where they go."""

from __future__ import annotations

import difflib
import math
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pgm_scale.data.manifest import ImageContent
from pgm_scale.errors import UserError
from pgm_scale.files import check_writable
from pgm_scale.sampling import known_prefixes
from pgm_scale.sampling.images import (
    Box,
    decode_images,
    known_inside,
    known_outside,
    read_image,
    write_image_files,
    write_image_grid,
)
from pgm_scale.sampling.output import write_samples
from pgm_scale.sampling.request import SampleRequest, parse_quirks
from pgm_scale.trained_model import TrainedModel
from pgm_scale.vq_tokenizer import VQTokenizer


class ImageJob:
    """What a request says of the images of a run."""

    def __init__(self, run: TrainedModel, request: SampleRequest, device: torch.device) -> None:
        content = run.description.images
        assert content is not None, "this is no run of images"
        self.content: ImageContent = content
        self.description, self.request, self.device = run.description, request, device
        self.run_folder = run.folder
        self.labels = class_numbers(request.images.classes, content.class_names)
        self.output_kind = _output_kind(request.output_path)
        if self.output_kind != "codes":
            _ = self.vq  # what is wrong with it should be told before sampling

    @staticmethod
    def check(request: SampleRequest) -> None:
        """Refuse, before anything is loaded, what cannot be."""
        options = request.images
        if _output_kind(request.output_path) != "folder":
            check_writable("--out", str(request.output_path))
        boxes = {"--box": options.box, "--keep-box": options.keep_box}
        given = {option: text for option, text in boxes.items() if text is not None}
        if len(given) != (options.inpaint_path is not None):
            raise UserError(
                "--inpaint IMAGE and either --box or --keep-box x0,y0,x1,y1 go together; give one of each or none"
            )
        for option, text in given.items():
            parse_box(text, option)
        if options.quirks is not None:
            parse_quirks(options.quirks)

    @cached_property
    def vq(self) -> VQTokenizer:
        """The tokenizer whose codes the run has learned.

        Raises:
            UserError: there is none, or it is another one.
        """
        path = self.request.images.vq_path or self.run_folder
        vq = VQTokenizer.load(path, self.device)
        if vq.sha256 != self.description.tokenizer_sha256:
            raise UserError(
                f"{path} is not the VQ tokenizer that the run's data were made with; give that one with --vq"
            )
        return vq

    def inputs(self, known_BL: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """`known_BL` and `labels_B` of all samples: each known row `count` times for each class."""
        if known_BL is None:
            known_BL = self._known_of_image()
        rows = np.repeat(known_BL, self.request.count, axis=0)
        known_BL = np.tile(rows, (len(self.labels), 1))
        return known_BL, self._labels(len(known_BL))

    def write(self, tokens_BL: np.ndarray) -> None:
        path = self.request.output_path
        assert path is not None, "`check` has seen to it"
        if self.output_kind == "codes":
            write_samples(path, tokens_BL, "npy")
            return
        images_BHWC = decode_images(self.vq, tokens_BL)
        if self.output_kind == "folder":
            write_image_files(path, images_BHWC, self._labels(len(images_BHWC)))
        else:
            write_image_grid(path, images_BHWC, self._columns(len(images_BHWC)))

    def _labels(self, count: int) -> np.ndarray:
        return np.repeat(self.labels, count // len(self.labels))

    def _known_of_image(self) -> np.ndarray:
        bos_id, options = self.description.vocabulary.bos_id, self.request.images
        if options.inpaint_path is None:
            return known_prefixes([[]], self.description.length_tokens, bos_id)
        pixels = read_image(options.inpaint_path, self.content.side_pixels, self.content.channels)
        if options.box is not None:
            return known_outside(pixels, parse_box(options.box, "--box"), self.vq, bos_id)
        assert options.keep_box is not None, "`check` has seen to it"
        return known_inside(pixels, parse_box(options.keep_box, "--keep-box"), self.vq, bos_id)

    def _columns(self, count: int) -> int:
        """By default a row of the grid for each class, or, with one image each or one class, about a square."""
        a_class = count // len(self.labels)
        square = math.ceil(math.sqrt(count))
        return self.request.images.columns or (a_class if len(self.labels) > 1 < a_class else square)


def _output_kind(path: str | None) -> Literal["codes", "grid", "folder"]:
    if path is None:
        raise UserError("images cannot be printed; add --out FILE.png, a folder, or FILE.npy for their codes")
    suffix = Path(path).suffix.lower()
    if suffix not in ("", ".png", ".npy"):
        raise UserError(
            f"--out {path}: end it in .png for a grid, in .npy for codes, or in nothing for a folder"
        )
    if suffix == "" and Path(path).exists() and not (Path(path).is_dir() and not any(Path(path).iterdir())):
        raise UserError(f"--out {path}: not an empty folder; give a new one")
    return "grid" if suffix == ".png" else "codes" if suffix == ".npy" else "folder"


def parse_box(text: str, option: str) -> Box:
    """The four whole numbers of `x0,y0,x1,y1`, as given to the option."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(_is_number(number.strip()) for number in numbers):
        raise UserError(f"{option} {text}: give four whole numbers, x0,y0,x1,y1 in pixels")
    x0, y0, x1, y1 = (int(number) for number in numbers)
    return x0, y0, x1, y1


def class_numbers(given: list[str] | None, names: tuple[str, ...]) -> np.ndarray:
    """int64 numbers of the classes given: each item is a name, or several numbers and names between commas.

    None is every class in turn; `none` stands for no class. Digits are a number where no class has that name.
    """
    if given is None:
        return np.arange(len(names))
    numbers = {"none": len(names)} | {name.lower(): number for number, name in enumerate(names)}
    items = [
        item.strip()
        for text in given
        for item in ([text] if text.strip().lower() in numbers else text.split(","))
    ]
    return np.array([_class_number(item, numbers, len(names)) for item in items], np.int64)


def _class_number(item: str, numbers: dict[str, int], classes: int) -> int:
    named = numbers.get(item.lower())
    number = named if named is not None else int(item) if _is_number(item) else -1
    if named is None and not 0 <= number < classes:
        near = difflib.get_close_matches(item.lower(), numbers, n=3)
        hint = (
            f"; did you mean {' or '.join(near)}?" if near else f"; give a number below {classes} or a name"
        )
        raise UserError(f"--classes {item}: the run has no such class{hint}")
    return number


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 19
