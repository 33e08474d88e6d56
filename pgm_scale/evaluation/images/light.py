"""Features without weights: some numbers of colour, shape and edges, for where no weights can be had."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgm_scale.evaluation.images.features import FeatureRows

_SIDE = 32  # images are compared at this size, but for the last group of features
_CELLS = 4  # cells a side, in which edges are averaged
_ORIENTATIONS = 8
_LUMA = (0.299, 0.587, 0.114)
_WHITE = 100.0  # features are in percent, which gives distances of a readable size
_BATCH_IMAGES = 64


class LightFeatures:
    """240 numbers of an image x in [0, 100], the same on every machine up to rounding.

    Let x' be x resized to 32 x 32 (bilinear, antialiased), Y its luma, Cb and Cr its colour differences B - Y and
    R - Y (0 of a grey image). In this order:

        64   lowest 8 x 8 coefficients of the orthonormal DCT-II of Y, over 32, so that the first is the mean
        32   the lowest 4 x 4 of Cb and of Cr, likewise
        128  edges of Y by direction: gradient magnitude times max(0, cos 2(angle - k pi / 8))^2, k = 0..7, mean
             over each of 4 x 4 cells
        16   gradient magnitude of the luma of x at its own size, mean over each of 4 x 4 cells: sharpness and noise

    Gradients are central differences, with the border repeated. The distance is not an FID, and small images of
    few classes are what it is good for.
    """

    name = "light-1"
    dimension = 240
    weights_sha256: str | None = None
    distance_name = "light_distance"

    def __call__(self, pixels_BHWC: np.ndarray) -> FeatureRows:
        parts = torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).split(_BATCH_IMAGES)
        with torch.inference_mode():
            return FeatureRows(torch.cat([_features(part) for part in parts]).numpy())


def _features(pixels_BHWC: Tensor) -> Tensor:
    full_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() * (_WHITE / 255.0)
    small_BCHW = F.interpolate(full_BCHW, (_SIDE, _SIDE), mode="bilinear", antialias=True)
    luma_BHW = _luma(small_BCHW)
    blue_BHW, red_BHW = small_BCHW[:, -1] - luma_BHW, small_BCHW[:, 0] - luma_BHW
    groups = [
        _low_frequencies(luma_BHW, 8),
        _low_frequencies(blue_BHW, 4),
        _low_frequencies(red_BHW, 4),
        _cell_means(_directed_edges(luma_BHW)),
        _cell_means(_magnitude(*_gradient(_luma(full_BCHW))).unsqueeze(1)),
    ]
    return torch.cat([group.flatten(1) for group in groups], dim=1)


def _luma(image_BCHW: Tensor) -> Tensor:
    if image_BCHW.shape[1] == 1:
        return image_BCHW[:, 0]
    return torch.einsum("bchw,c->bhw", image_BCHW, torch.tensor(_LUMA))


def _low_frequencies(image_BHW: Tensor, count: int) -> Tensor:
    """[B, count, count] of the DCT-II: matrix rows sqrt(2 / N) cos(pi k (n + 1/2) / N), the first over sqrt 2."""
    places_N = torch.arange(_SIDE, dtype=torch.float64) + 0.5
    frequencies_K1 = torch.arange(count, dtype=torch.float64).unsqueeze(1)
    basis_KN = torch.cos(math.pi / _SIDE * frequencies_K1 * places_N) * math.sqrt(2.0 / _SIDE)
    basis_KN[0] /= math.sqrt(2.0)
    basis_KN = basis_KN.float()
    return basis_KN @ image_BHW @ basis_KN.T / _SIDE


def _gradient(image_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Differences along columns and along rows."""
    padded_BHW = F.pad(image_BHW.unsqueeze(1), (1, 1, 1, 1), mode="replicate")[:, 0]
    along_x = (padded_BHW[:, 1:-1, 2:] - padded_BHW[:, 1:-1, :-2]) / 2
    along_y = (padded_BHW[:, 2:, 1:-1] - padded_BHW[:, :-2, 1:-1]) / 2
    return along_x, along_y


def _magnitude(along_x: Tensor, along_y: Tensor) -> Tensor:
    return (along_x.square() + along_y.square()).sqrt()


def _directed_edges(image_BHW: Tensor) -> Tensor:
    """[B, 8, H, W]. An angle and its opposite are one direction, hence the doubled angle."""
    along_x, along_y = _gradient(image_BHW)
    doubled_BHW = 2 * torch.atan2(along_y, along_x)
    centres_O = torch.arange(_ORIENTATIONS) * (2 * math.pi / _ORIENTATIONS)
    shares_BOHW = (doubled_BHW.unsqueeze(1) - centres_O[:, None, None]).cos().clamp(min=0.0).square()
    return shares_BOHW * _magnitude(along_x, along_y).unsqueeze(1)


def _cell_means(maps_BOHW: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(maps_BOHW, _CELLS)
