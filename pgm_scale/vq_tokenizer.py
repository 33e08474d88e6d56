"""The VQ tokenizer of image data: uint8 images to grids of codes and back, and the files it lives in.

    <folder>/tokenizer.json    {"kind": "vq", "config": {...}, "weights_sha256": ...}
    <folder>/vq.safetensors    its fp32 parameters, by their published names

Published `.pt` files are opened as plain data: no code in them ever runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pgm_scale import config as configuration
from pgm_scale.config import VQModelConfig
from pgm_scale.convert.torch_file import refuse_compressed
from pgm_scale.data.manifest import TOKENIZER_NAME, VQ_WEIGHTS_NAME
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, read_bounded
from pgm_scale.models.vq import NORM_GROUPS, VQModel, downsampling, unit_range
from pgm_scale.run_folder import RunFolder, load_run

# How often training chose each code: a published buffer that nothing else reads.
_IGNORED = {"quantize.codebook_used"}
_NAMED_PROBLEMS = 8
_MOST_BYTES = 1 << 34  # of weights; the published ones have 280 MB


class VQTokenizer:
    """A VQ model in fp32, for use: without gradients, in eval mode, on one device."""

    def __init__(self, model: VQModel, device: torch.device | str = "cpu") -> None:
        self.config = model.config
        self.device = torch.device(device)
        self.model = model.to(self.device, torch.float32).eval().requires_grad_(False)

    @property
    def downsampling(self) -> int:
        """Pixels a code, along a side."""
        return downsampling(self.config)

    @cached_property
    def sha256(self) -> str:
        """Of the description: what manifests and runs call `tokenizer_sha256`."""
        return hashlib.sha256(self.description()).hexdigest()

    @torch.inference_mode()
    def encode(self, pixels_BHWC: np.ndarray | Tensor, batch_images: int = 16) -> np.ndarray:
        """int64 codes `[B, h * w]`, row by row, of uint8 images; `batch_images` at a time bound the memory.

        On a GPU the convolutions are computed in full fp32, not TF32: codes are data, and those of a CPU and a
        GPU should differ only where two codes are equally near.

        Raises:
            UserError: sides that are no multiple of `downsampling`, or another number of channels.
        """
        images_BHWC = torch.as_tensor(pixels_BHWC)
        self._check_images(images_BHWC)
        codes = [np.empty((0, math.prod(images_BHWC.shape[1:3]) // self.downsampling**2), np.int64)]
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for batch_BHWC in images_BHWC.split(batch_images):
                images_BCHW = unit_range(batch_BHWC.to(self.device))
                if len(images_BCHW):
                    codes.append(self.model.encode(images_BCHW).cpu().numpy())
        return np.concatenate(codes)

    @torch.inference_mode()
    def decode(self, codes_BL: np.ndarray, batch_images: int = 16) -> np.ndarray:
        """uint8 images `[B, H, W, C]` of the int codes `[B, h * w]` of square grids, clamped to 0..255.

        On a GPU in full fp32, as `encode`.

        Raises:
            UserError: codes that the codebook does not have, or that are not a square number an image.
        """
        self._check_codes(codes_BL)
        side = math.isqrt(codes_BL.shape[1]) * self.downsampling
        images_BHWC = np.empty((len(codes_BL), side, side, self.config.image_channels), np.uint8)
        for first in range(0, len(codes_BL), batch_images):
            rows = slice(first, first + batch_images)
            batch_BL = torch.as_tensor(np.ascontiguousarray(codes_BL[rows], np.int64))
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                images_BCHW = self.model.decode(batch_BL.to(self.device))
            images_BHWC[rows] = to_pixels(images_BCHW).cpu().numpy()
        return images_BHWC

    def description(self) -> bytes:
        """The bytes of `tokenizer.json`, whose SHA-256 tells tokenizers apart."""
        content = {
            "kind": "vq",
            "config": asdict(self.config),
            "weights_sha256": hashlib.sha256(self._weights).hexdigest(),
        }
        return (json.dumps(content, sort_keys=True, indent=2) + "\n").encode()

    def save(self, folder: str | Path) -> None:
        """Write `vq.safetensors`, then `tokenizer.json`, into an existing folder."""
        atomic_write_bytes(Path(folder) / VQ_WEIGHTS_NAME, self._weights)
        atomic_write_bytes(Path(folder) / TOKENIZER_NAME, self.description())

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> VQTokenizer:
        """From a published `.pt`, a folder that `save` wrote to, or the run folder of a VQ model (EMA weights).

        Raises:
            UserError: none of these, a damaged file, or one that would have to run code to be opened.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(
                f"{path}: no such VQ tokenizer; give a LlamaGen .pt, a run folder or a split folder"
            )
        if path.is_file():
            return cls(_model_of(_published_tensors(path), None, path), device)
        if (path / VQ_WEIGHTS_NAME).exists():
            return cls(_model_of_folder(path), device)
        run = RunFolder(path)
        if run.config_path.exists() and isinstance(run.config().model, VQModelConfig):
            model = load_run(path).model
            assert isinstance(model, VQModel)
            return cls(model, device)
        raise UserError(
            f"{path} holds no VQ tokenizer (no {VQ_WEIGHTS_NAME}, and it is not the run folder of a VQ model); "
            "give the folder of one, or a LlamaGen .pt"
        )

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Any], path: Path) -> VQTokenizer:
        """From published names and tensors, whose shapes tell the sizes; `path` is where they come from.

        Raises:
            UserError: they are not a VQ tokenizer's.
        """
        return cls(_model_of({name: t for name, t in tensors.items() if name not in _IGNORED}, None, path))

    @cached_property
    def _weights(self) -> bytes:
        return safetensors.torch.save({name: t.cpu().contiguous() for name, t in self._tensors.items()})

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def _check_images(self, images_BHWC: Tensor) -> None:
        shape, channels = tuple(images_BHWC.shape), self.config.image_channels
        fits = len(shape) == 4 and shape[3] == channels and not any(s % self.downsampling for s in shape[1:3])
        if not fits or images_BHWC.dtype != torch.uint8:
            raise UserError(
                f"images of shape {shape} and type {images_BHWC.dtype} do not fit the VQ tokenizer; it takes uint8 "
                f"[images, height, width, {channels}] with sides divisible by {self.downsampling}"
            )

    def _check_codes(self, codes_BL: np.ndarray) -> None:
        if codes_BL.ndim != 2 or math.isqrt(codes_BL.shape[1]) ** 2 != codes_BL.shape[1]:
            raise UserError(f"codes of shape {codes_BL.shape} are not [images, codes of a square grid]")
        if codes_BL.size and not 0 <= codes_BL.min() <= codes_BL.max() < self.config.codebook_size:
            raise UserError(
                f"codes from {codes_BL.min()} to {codes_BL.max()} are not in the codebook of "
                f"{self.config.codebook_size}"
            )


def to_pixels(images_BCHW: Tensor) -> Tensor:
    """uint8 `[B, H, W, C]` of images in [-1, 1]; what is outside is clamped."""
    scaled_BCHW = (images_BCHW.clamp(-1, 1) + 1) * 127.5
    return scaled_BCHW.round().to(torch.uint8).permute(0, 2, 3, 1)


def _published_tensors(path: Path) -> Mapping[str, Any]:
    """The named tensors of a LlamaGen checkpoint: the average if it has one, else the model."""
    try:
        # Its training script also stores its arguments, a class that only holds values.
        refuse_compressed(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a LlamaGen .pt") from None
    except Exception:  # what a garbled file makes of the unpickler shares no base class
        raise UserError(
            f"{path}: refused, as it is damaged or would have to run code to be opened; give a LlamaGen .pt that "
            "holds tensors only"
        ) from None
    for key in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return {str(name): t for name, t in content[key].items() if name not in _IGNORED}
    raise UserError(f"{path}: neither `ema` nor `model` in it; give a checkpoint of a LlamaGen VQ tokenizer")


def _model_of_folder(folder: Path) -> VQModel:
    path = folder / TOKENIZER_NAME
    try:
        tree = json.loads(read_bounded(path))
        kind, config_tree, sha256 = tree["kind"], tree["config"], tree["weights_sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} does not describe a VQ tokenizer ({type(error).__name__}: {error}); restore it"
        ) from None
    problems: list[str] = [] if kind == "vq" else [f"its kind is {kind!r}, not 'vq'"]
    config = configuration.parse(VQModelConfig, config_tree, problems)
    if problems:
        raise UserError(f"{path} does not describe a VQ tokenizer: {'; '.join(problems)}; restore it")
    weights_path = folder / VQ_WEIGHTS_NAME
    try:
        weights = read_bounded(weights_path, _MOST_BYTES)
        if hashlib.sha256(weights).hexdigest() != sha256:
            raise UserError(f"{weights_path} is not the file that {path} names (other SHA-256); restore it")
        tensors = safetensors.torch.load(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {weights_path}: {error}; restore it") from None
    return _model_of(tensors, config, weights_path)


def _model_of(tensors: Mapping[str, Any], config: VQModelConfig | None, path: Path) -> VQModel:
    """The model of these parameters, all of which it has to be made of; without a config, of their shapes."""
    not_tensors = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise UserError(f"{path}: {_listed(not_tensors)} in it: not tensors; give a VQ tokenizer's weights")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = config or _config_of(shapes, path)
    try:
        with torch.device("meta"):
            model = VQModel(config)
    except (ValueError, RuntimeError, LookupError, ArithmeticError) as error:  # sizes that no layer can have
        raise UserError(f"{path}: no VQ model has the sizes {config} ({error}); restore its files") from None
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        raise UserError(f"{path} does not hold a VQ tokenizer's weights: {_listed(problems)}")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model


def _config_of(shapes: Mapping[str, tuple[int, ...]], path: Path) -> VQModelConfig:
    """The architecture, which the published files do not name, by the shapes of its parameters."""
    try:
        channels, image_channels = shapes["encoder.conv_in.weight"][:2]
        codebook_size, code_size = shapes["quantize.embedding.weight"]
        widths = _counted(lambda i: shapes.get(f"encoder.conv_blocks.{i}.res.0.conv1.weight"))
        blocks = _counted(lambda i: shapes.get(f"encoder.conv_blocks.0.res.{i}.conv1.weight"))
        z_channels = shapes["encoder.conv_out.weight"][0]
        if not widths or channels < 1 or channels % NORM_GROUPS or any(w[0] % channels for w in widths):
            raise ValueError(f"{channels} channels, then {[w[0] for w in widths]}")
    except (LookupError, ValueError) as error:
        raise UserError(
            f"{path} does not hold a VQ tokenizer's weights ({type(error).__name__}: {error}); give a LlamaGen .pt"
        ) from None
    return VQModelConfig(
        codebook_size=codebook_size,
        code_size=code_size,
        channels=channels,
        channel_multipliers=tuple(width[0] // channels for width in widths),
        num_res_blocks=len(blocks),
        z_channels=z_channels,
        image_channels=image_channels,
    )


def _counted(shape_of: Callable[[int], tuple[int, ...] | None]) -> list[tuple[int, ...]]:
    """The shapes number 0, 1, ... up to the first that is absent."""
    shapes: list[tuple[int, ...]] = []
    while (shape := shape_of(len(shapes))) is not None:
        shapes.append(shape)
    return shapes


def _listed(problems: list[str]) -> str:
    more = len(problems) - _NAMED_PROBLEMS
    return "; ".join(problems[:_NAMED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
