"""What an extractor of features is, and which one the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from pgm_scale.errors import UserError

FeatureKind = Literal["inception", "light"]


@dataclass(frozen=True)
class FeatureRows:
    """float32 features [B, F], and the logits [B, K] of the extractor's own classes if it has any."""

    features_BF: np.ndarray
    logits_BK: np.ndarray | None = None


class ImageFeatures(Protocol):
    """Pixels to features: a function of each image alone.

    Attributes:
        name: of the definition; another name is another number.
        weights_sha256: of the weights file; None for an extractor without weights.
        distance_name: what the Fréchet distance of these features is called in results.
    """

    name: str
    dimension: int
    weights_sha256: str | None
    distance_name: str

    def __call__(self, pixels_BHWC: np.ndarray) -> FeatureRows:
        """Features of uint8 pixels with 1 or 3 channels."""
        ...


def describe(features: ImageFeatures) -> dict[str, Any]:
    """What tells these features from others, in plain JSON values."""
    return {
        "name": features.name,
        "dimension": features.dimension,
        "weights_sha256": features.weights_sha256,
    }


def open_features(kind: FeatureKind, inception_path: str | None, device: torch.device) -> ImageFeatures:
    """The extractor of that kind.

    Raises:
        UserError: Inception's weights are not given, are absent or are something else.
    """
    if kind == "light":
        if inception_path is not None:
            raise UserError("--inception gives the weights of inception features; add --features inception")
        from pgm_scale.evaluation.images.light import LightFeatures

        return LightFeatures()
    from pgm_scale.evaluation.images.inception import InceptionFeatures

    return InceptionFeatures(inception_path, device)
