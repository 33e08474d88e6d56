"""Inception features with random weights: the file is read safely, and the pixels are prepared as published."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as published

from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.features import open_features
from pgm_scale.evaluation.images.inception import WEIGHTS_FILE, InceptionFeatures, inception_pixels
from pgm_scale.files import sha256_file

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(published, "load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # its constructor loads something in any case
        patch.setattr(published, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    d = np.abs(distance)
    inner, outer = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, inner, np.where(d < 2, outer, 0))


def _resizing_matrix(source: int, target: int) -> np.ndarray:
    """[target, source]: each row a kernel around the target's place, stretched when shrinking (antialias)."""
    scale = source / target
    stretch = max(scale, 1.0)
    places = (np.arange(target)[:, None] + 0.5) * scale - (np.arange(source) + 0.5)
    matrix = _cubic(places / stretch)
    return matrix / matrix.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("side", [32, 256, 400])
def test_pixels_are_resized_in_float_with_an_antialiased_cubic_and_cut(side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    matrix = _resizing_matrix(side, 299)
    planes = matrix @ pixels.transpose(2, 0, 1).astype(np.float64) @ matrix.T
    expected = planes.transpose(1, 2, 0).clip(0, 255)
    found = inception_pixels(pixels).astype(np.float64)
    assert ((expected - 1 - 1e-2 <= found) & (found <= expected + 1e-2)).all()  # cut, not rounded
    grey = inception_pixels(pixels[..., :1])
    np.testing.assert_array_equal(grey, np.repeat(grey[..., :1], 3, axis=-1))


def test_features_are_those_of_the_published_network(weights: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    features = InceptionFeatures(weights, CPU, batch_images=1)
    assert features.weights_sha256 == sha256_file(weights)
    found = features(images)
    network = published.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    prepared = torch.from_numpy(np.stack([inception_pixels(image) for image in images]))
    pooled, logits = network(prepared.permute(0, 3, 1, 2))
    assert found.features_BF.shape == (2, 2048)
    np.testing.assert_allclose(found.features_BF, pooled, rtol=1e-4, atol=1e-5)
    assert found.logits_BK is not None
    np.testing.assert_allclose(found.logits_BK, logits, rtol=1e-4, atol=1e-5)


def test_missing_and_other_files_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--inception PATH of torch-fidelity's {WEIGHTS_FILE}"):
        open_features("inception", None, CPU)
    with pytest.raises(UserError, match=f"absent.pth: no such file; it is torch-fidelity's {WEIGHTS_FILE}"):
        open_features("inception", str(tmp_path / "absent.pth"), CPU)
    with pytest.raises(UserError, match="add --features inception"):
        open_features("light", "x.pth", CPU)
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    (tmp_path / "text.pth").write_text("not weights")
    for path in (other, tmp_path / "text.pth"):
        with pytest.raises(UserError, match=f"{path.name}: not {WEIGHTS_FILE}") as refused:
            open_features("inception", str(path), CPU)
        assert "\n" not in str(refused.value)


@pytest.mark.fault(26)
def test_code_in_a_weights_file_does_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was_here"),)

    hostile = tmp_path / "hostile.pth"
    torch.save({"fc.weight": Hostile()}, hostile)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    for path in (hostile, tmp_path / "plain.pth"):
        with pytest.raises(UserError, match="not weights-inception"):
            InceptionFeatures(path, CPU)
    assert not (tmp_path / "was_here").exists()
