"""Files of statistics: ours go around exactly, the published one is read, others are refused."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.features import FeatureRows
from pgm_scale.evaluation.images.moments import Moments
from pgm_scale.evaluation.images.statistics import read_statistics, write_statistics


@dataclass
class Three:
    """Three features, of which only the description is used."""

    name: str = "three"
    dimension: int = 3
    weights_sha256: str | None = None
    distance_name: str = "distance"

    def __call__(self, pixels_BHWC: np.ndarray) -> FeatureRows:
        raise NotImplementedError


def _moments() -> Moments:
    rows = np.random.default_rng(0).normal(size=(9, 3))
    return Moments(rows.mean(axis=0), np.cov(rows, rowvar=False), 9)


@pytest.mark.parametrize("weights", [None, "ab"])
def test_statistics_go_to_a_file_and_back_exactly(tmp_path: Path, weights: str | None) -> None:
    features, moments = Three(weights_sha256=weights), _moments()
    write_statistics(tmp_path / "s.npz", moments, features, "split x")
    found = read_statistics(tmp_path / "s.npz", features)
    np.testing.assert_array_equal(found.mean_F, moments.mean_F)
    np.testing.assert_array_equal(found.covariance_FF, moments.covariance_FF)
    assert found.count == 9


def test_the_published_file_of_tensors_is_read(tmp_path: Path) -> None:
    moments = _moments()
    content = {"mu": torch.tensor(moments.mean_F), "cov": torch.tensor(moments.covariance_FF)}
    torch.save(content, tmp_path / "s.pt")
    found = read_statistics(tmp_path / "s.pt", Three())
    np.testing.assert_array_equal(found.covariance_FF, moments.covariance_FF)
    assert found.count is None


def test_statistics_of_other_features_are_refused(tmp_path: Path) -> None:
    write_statistics(tmp_path / "s.npz", _moments(), Three(), "split x")
    with pytest.raises(UserError, match="of three features with weights None, not of four"):
        read_statistics(tmp_path / "s.npz", Three(name="four"))
    with pytest.raises(UserError, match="with weights None, not of three with ab"):
        read_statistics(tmp_path / "s.npz", Three(weights_sha256="ab"))
    torch.save({"mu": torch.zeros(2), "cov": torch.eye(2)}, tmp_path / "s.pt")
    with pytest.raises(UserError, match=r"mean \(2,\) and covariance \(2, 2\) are not of the 3 three"):
        read_statistics(tmp_path / "s.pt", Three())


@pytest.mark.fault(26)
def test_what_is_no_file_of_statistics_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "text.pt").write_text("no")
    torch.save({"mu": 3}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"mu": torch.nn.Linear(1, 1), "cov": 1}, tmp_path / "code.pt")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=f"cannot read statistics from .*{path.name}") as refused:
            read_statistics(path, Three())
        assert "\n" not in str(refused.value)
