"""Moments, Fréchet distance and Inception score against slow and closed forms."""

import numpy as np
import pytest
import scipy.linalg

from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.frechet import frechet_distance
from pgm_scale.evaluation.images.inception_score import inception_score, softmax
from pgm_scale.evaluation.images.moments import Moments, MomentsAccumulator


def _moments(features: np.ndarray, pieces: int = 1) -> Moments:
    accumulator = MomentsAccumulator(features.shape[1])
    for piece in np.array_split(features, pieces):
        accumulator.add(piece)
    return accumulator.result()


def _covariance(seed: int, size: int, rank: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(size, rank))
    return factor @ factor.T


def test_moments_in_pieces_equal_numpy_on_the_whole() -> None:
    # float32, and a mean of 1000 standard deviations: sums of squares would lose three digits of eight more.
    features = (np.random.default_rng(0).normal(size=(101, 7)) + 1000).astype(np.float32)
    for pieces in (1, 5, 101):
        found = _moments(features, pieces)
        assert found.count == 101
        np.testing.assert_allclose(found.mean_F, features.astype(np.float64).mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(
            found.covariance_FF, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9
        )


def test_merging_ranks_equals_adding_all_pieces_to_one() -> None:
    features = np.random.default_rng(1).normal(size=(64, 5))
    total = MomentsAccumulator(5)
    for share in (features[:10], features[10:10], features[10:]):
        rank = MomentsAccumulator(5)
        rank.add(share)
        total.merge(rank)
    np.testing.assert_allclose(total.result().covariance_FF, np.cov(features, rowvar=False), rtol=1e-12)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(UserError, match=r"1 image\(s\) have no covariance"):
        _moments(np.ones((1, 3)))


def test_distance_of_gaussians_with_commuting_covariances_has_a_closed_form() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    first, second = np.array([4.0, 1.0, 0.25, 9.0, 0.0, 2.0]), np.array([1.0, 1.0, 4.0, 0.0, 0.0, 3.0])
    shift = np.arange(6.0)
    found = frechet_distance(
        Moments(shift, rotation @ np.diag(first) @ rotation.T, 10),
        Moments(np.zeros(6), rotation @ np.diag(second) @ rotation.T, 10),
    )
    expected = shift @ shift + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert found == pytest.approx(expected, rel=1e-12)


def test_distance_equals_the_published_matrix_root() -> None:
    first, second = _covariance(3, 20, 30), _covariance(4, 20, 30)
    root = scipy.linalg.sqrtm(first @ second).real
    means = np.random.default_rng(5).normal(size=(2, 20))
    expected = np.square(means[0] - means[1]).sum() + np.trace(first + second - 2 * root)
    found = frechet_distance(Moments(means[0], first, 30), Moments(means[1], second, 30))
    assert found == pytest.approx(expected, rel=1e-10)


def test_singular_covariances_are_the_limit_of_regular_ones() -> None:
    """Fewer images than features, where the published code may have to add 1e-6 to the diagonal."""
    first, second, zero = _covariance(6, 12, 4), _covariance(7, 12, 3), np.zeros(12)
    found = frechet_distance(Moments(zero, first, 5), Moments(zero, second, 4))
    jitter = 1e-10 * np.eye(12)
    root = scipy.linalg.sqrtm((first + jitter) @ (second + jitter)).real
    assert found == pytest.approx(np.trace(first + second - 2 * root), rel=1e-4)
    assert frechet_distance(Moments(zero, first, 5), Moments(zero, first, 5)) == pytest.approx(0, abs=1e-9)


def test_other_features_and_broken_ones_are_refused() -> None:
    good = Moments(np.zeros(2), np.eye(2), 3)
    with pytest.raises(UserError, match="of 2 and of 3 features cannot be compared"):
        frechet_distance(good, Moments(np.zeros(3), np.eye(3), 3))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(good, Moments(np.array([0.0, np.nan]), np.eye(2), 3))


def test_inception_score_equals_a_loop_over_its_definition() -> None:
    logits = np.random.default_rng(8).normal(size=(53, 6), scale=3).astype(np.float32)
    probabilities = softmax(logits)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    order = np.random.default_rng(0).permutation(53)
    scores = []
    for part in np.array_split(order, 10):
        divergences = []
        for image in part:
            divergence = 0.0
            for label in range(6):
                p = probabilities[image, label]
                divergence += p * (np.log(p) - np.log(np.mean([probabilities[i, label] for i in part])))
            divergences.append(divergence)
        scores.append(np.exp(np.mean(divergences)))
    found = inception_score(probabilities)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.standard_deviation == pytest.approx(np.std(scores), rel=1e-9)


def test_inception_score_is_the_number_of_classes_at_best_and_one_at_worst() -> None:
    certain = np.tile(np.eye(4), (100, 1))
    assert inception_score(certain, splits=1).mean == pytest.approx(4, rel=1e-12)
    assert inception_score(np.full((100, 4), 0.25)).mean == pytest.approx(1, rel=1e-12)
