"""The light features against their definition, and the classifier that learns from them."""

import math

import numpy as np
import pytest

from pgm_scale.evaluation.images.classifier import LightClassifier
from pgm_scale.evaluation.images.light import LightFeatures


def _oracle(image: np.ndarray) -> np.ndarray:
    """The 240 numbers of one 32 x 32 image (no resizing) in plain loops."""
    x = image.astype(np.float64) / 255 * 100
    luma = x @ np.array([0.299, 0.587, 0.114]) if image.shape[2] == 3 else x[..., 0]
    blue, red = (x[..., -1] - luma, x[..., 0] - luma)
    numbers = []
    for plane, count in ((luma, 8), (blue, 4), (red, 4)):
        for k in range(count):
            for j in range(count):
                scale = math.sqrt((1 if k == 0 else 2) / 32) * math.sqrt((1 if j == 0 else 2) / 32)
                rows = np.cos(math.pi / 32 * k * (np.arange(32) + 0.5))
                columns = np.cos(math.pi / 32 * j * (np.arange(32) + 0.5))
                numbers.append(scale * (rows[:, None] * columns * plane).sum() / 32)
    edges = np.zeros((9, 32, 32))
    for i in range(32):
        for j in range(32):
            along_x = (luma[i, min(j + 1, 31)] - luma[i, max(j - 1, 0)]) / 2
            along_y = (luma[min(i + 1, 31), j] - luma[max(i - 1, 0), j]) / 2
            magnitude, angle = math.hypot(along_x, along_y), math.atan2(along_y, along_x)
            for k in range(8):
                edges[k, i, j] = magnitude * max(0.0, math.cos(2 * (angle - k * math.pi / 8))) ** 2
            edges[8, i, j] = magnitude
    numbers += [
        plane[i : i + 8, j : j + 8].mean()
        for plane in edges
        for i in range(0, 32, 8)
        for j in range(0, 32, 8)
    ]
    return np.array(numbers)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_what_their_definition_says(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, channels), dtype=np.uint8)
    found = LightFeatures()(images)
    assert found.logits_BK is None
    assert found.features_BF.shape == (3, LightFeatures.dimension)
    expected = np.stack([_oracle(image) for image in images])
    np.testing.assert_allclose(found.features_BF, expected, atol=2e-4)


def test_features_of_an_image_do_not_depend_on_its_neighbours_nor_on_its_size() -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    together, alone = LightFeatures()(images).features_BF, LightFeatures()(images[66:67]).features_BF
    np.testing.assert_allclose(together[66:67], alone, rtol=1e-5, atol=1e-5)
    flat = np.full((1, 200, 200, 3), 51, np.uint8)
    expected = np.zeros((1, 240))
    expected[0, 0] = 20.0  # the mean, in percent
    np.testing.assert_allclose(LightFeatures()(flat).features_BF, expected, atol=1e-4)


def test_the_classifier_learns_digits_it_has_not_seen() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16 * 255).astype(np.uint8)[..., None]
    features = LightFeatures()(images).features_BF
    classifier = LightClassifier(features[:1200], digits.target[:1200])
    assert classifier.accuracy(features[1200:], digits.target[1200:]) > 0.93
    probabilities = classifier.probabilities(features[1200:])
    assert probabilities.shape == (597, 10)
    agreement = (probabilities.argmax(axis=1) == digits.target[1200:]).mean()
    assert agreement == classifier.accuracy(features[1200:], digits.target[1200:])
