"""Files with the mean and covariance of a reference's features: ours (.npz), and the published one (.pt)."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from pgm_scale.convert.torch_file import open_torch_file
from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.features import ImageFeatures
from pgm_scale.evaluation.images.moments import Moments
from pgm_scale.evaluation.images.work import write_file
from pgm_scale.files import check_regular

_MOST_BYTES = 1 << 30  # the covariance of 2048 features has 34 MB
_NOT_MU_AND_COV = (ValueError, LookupError, TypeError, AttributeError)


def write_statistics(path: Path, moments: Moments, features: ImageFeatures, source: str) -> None:
    """Write an .npz of `mu`, `cov` (fp64), `count`, `features`, `features_sha256` and `source`, without pickle."""
    content = io.BytesIO()
    np.savez(
        content,
        mu=moments.mean_F,
        cov=moments.covariance_FF,
        count=np.int64(moments.count or 0),
        features=np.array(features.name),
        features_sha256=np.array(features.weights_sha256 or ""),
        source=np.array(source),
    )
    write_file(path, content.getvalue())


def read_statistics(path: Path, features: ImageFeatures) -> Moments:
    """Statistics to compare `features` with: an .npz of ours, or a `.pt` dict {mu, cov} (FACTS 9).

    Raises:
        UserError: neither of them, or made with other features; a `.pt` does not say which, but for their number.
    """
    moments, name, weights_sha256 = _read_pt(path) if path.suffix in (".pt", ".pth") else _read_npz(path)
    if name is not None and (name, weights_sha256) != (features.name, features.weights_sha256):
        raise UserError(
            f"{path} is of {name} features with weights {weights_sha256}, not of {features.name} with "
            f"{features.weights_sha256}; choose the features it was made with"
        )
    size = features.dimension
    if moments.mean_F.shape != (size,) or moments.covariance_FF.shape != (size, size):
        raise UserError(
            f"{path}: mean {moments.mean_F.shape} and covariance {moments.covariance_FF.shape} are not of "
            f"the {size} {features.name} features; choose the features it was made with"
        )
    return moments


def _read_npz(path: Path) -> tuple[Moments, str | None, str | None]:
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES:,} bytes in it")
        with np.load(path, allow_pickle=False) as content:
            return (
                Moments(content["mu"], content["cov"], int(content["count"]) or None),
                str(content["features"]),
                str(content["features_sha256"]) or None,
            )
    except Exception as error:  # what a garbled file leads to has no base class
        raise _unreadable(path, error) from None


def _read_pt(path: Path) -> tuple[Moments, str | None, str | None]:
    try:
        content = open_torch_file(path)
        mean_F, covariance_FF = (content[key].double().numpy() for key in ("mu", "cov"))
    except (UserError, *_NOT_MU_AND_COV) as error:
        raise _unreadable(path, error) from None
    return Moments(mean_F, covariance_FF, None), None, None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    return UserError(
        f"cannot read statistics from {path} ({reason}); give an .npz of ours or a .pt of mu and cov"
    )
