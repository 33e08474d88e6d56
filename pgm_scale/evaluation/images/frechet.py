"""The Fréchet distance of two Gaussians, which on Inception features is the FID (FACTS 7)."""

from __future__ import annotations

import numpy as np

from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.moments import Moments


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), in fp64.

    The last trace is the sum of the singular values of F1^T F2, for any factors F F^T = S. Unlike a matrix root
    of the product S1 S2, which is not symmetric, this is real and finite for singular covariances too, so that
    the usual retry with 1e-6 on the diagonal is not needed. It takes 6 s for 2048 features on one core.

    Raises:
        UserError: the moments have other sizes, or are not finite.
    """
    if first.mean_F.shape != second.mean_F.shape:
        raise UserError(
            f"statistics of {len(first.mean_F)} and of {len(second.mean_F)} features cannot be compared; "
            "use the features that the reference was made with"
        )
    for moments in (first, second):
        if not (np.isfinite(moments.mean_F).all() and np.isfinite(moments.covariance_FF).all()):
            raise UserError("features are not finite; check the images and the weights of the extractor")
    product_FF = _factor(first.covariance_FF).T @ _factor(second.covariance_FF)
    cross = np.linalg.svd(product_FF, compute_uv=False).sum()
    shift_F = first.mean_F - second.mean_F
    traces = np.trace(first.covariance_FF) + np.trace(second.covariance_FF)
    return max(float(shift_F @ shift_F + traces - 2 * cross), 0.0)  # rounding may go below


def _factor(covariance_FF: np.ndarray) -> np.ndarray:
    """F with F F^T = S; eigenvalues below 0 are rounding."""
    values_F, vectors_FF = np.linalg.eigh(covariance_FF)
    return vectors_FF * np.sqrt(np.maximum(values_F, 0.0))
