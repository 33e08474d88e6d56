"""Inception features as published: torch-fidelity's InceptionV3, weights from a file that is never downloaded."""

from __future__ import annotations

import io
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pgm_scale.convert.torch_file import refuse_compressed
from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.features import FeatureRows
from pgm_scale.files import sha256_file

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's release v0.2.0
_PUBLISHED_SHA256_START = "6726825d"  # as the file's name says
_SIDE = 299

_log = logging.getLogger(__name__)


class InceptionFeatures:
    """Pool features (2048) and unbiased logits (1008) of the "inception-v3-compat" network (FACTS 7)."""

    name = "inception-v3-compat"
    dimension = 2048
    distance_name = "fid"

    def __init__(self, weights_path: str | Path | None, device: torch.device, batch_images: int = 64) -> None:
        """Raises: UserError: no path, no such file, another file, or torch-fidelity is not installed."""
        path = _existing(weights_path)
        self.weights_sha256: str | None = sha256_file(path)
        if not self.weights_sha256.startswith(_PUBLISHED_SHA256_START):
            _log.warning("%s is not the published %s: its FID compares with nobody's", path, WEIGHTS_FILE)
        self._network = _network(path).to(device)
        self._device = device
        self._batch_images = batch_images

    def __call__(self, pixels_BHWC: np.ndarray) -> FeatureRows:
        with ThreadPoolExecutor() as pool:  # Pillow resizes without the interpreter's lock
            resized_BHWC = np.stack(list(pool.map(inception_pixels, pixels_BHWC)))
        resized_BCHW = torch.from_numpy(resized_BHWC).permute(0, 3, 1, 2)
        # On a GPU in full fp32, not TF32: the numbers of a CPU and of a GPU should agree.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            parts = [self._network(part.to(self._device)) for part in resized_BCHW.split(self._batch_images)]
        features, logits = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return FeatureRows(features, logits)


def inception_pixels(pixels_HWC: np.ndarray) -> np.ndarray:
    """uint8 [299, 299, 3]: each channel resized in float with Pillow's bicubic (as clean-fid), then cut to uint8.

    The published code cuts where one would round; this does the same.
    """
    channels = [
        np.asarray(Image.fromarray(channel).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
        for channel in pixels_HWC.astype(np.float32).transpose(2, 0, 1)
    ]
    resized_HWC = np.stack(channels * (3 // len(channels)), axis=-1)
    return resized_HWC.clip(0.0, 255.0).astype(np.uint8)


def _existing(weights_path: str | Path | None) -> Path:
    where = f"torch-fidelity's {WEIGHTS_FILE} (its release v0.2.0); nothing is downloaded here"
    if weights_path is None:
        raise UserError(f"inception features need --inception PATH of {where}; or use --features light")
    path = Path(weights_path)
    if not path.is_file():
        raise UserError(f"--inception {path}: no such file; it is {where}")
    return path


def _network(path: Path) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            "inception features need torch-fidelity; install it with pip install 'pgm-scale[images]'"
        ) from None
    safe = io.BytesIO()  # torch-fidelity would unpickle the file with whatever code is in it
    try:
        refuse_compressed(path)
        torch.save(torch.load(path, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        return FeatureExtractorInceptionV3(
            InceptionFeatures.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        )
    except (
        Exception
    ) as error:  # what another file makes of the unpickler and of the network has no base class
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--inception {path}: not {WEIGHTS_FILE} ({reason})") from None
