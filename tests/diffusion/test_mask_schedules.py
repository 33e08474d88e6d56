import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pgm_scale.diffusion.draws import stratified_uniform
from pgm_scale.diffusion.mask_schedules import decoded_counts, mask_ratio

# FACTS 2.3, N = 1024.
PUBLISHED = {
    32: "20 20 21 20 21 20 21 21 21 22 21 22 22 23 23 23 24 24 25 26 26 28 28 30 32 34 36 40 45 53 68 164",
    8: "81 83 86 91 99 112 142 330",
}
MEANS = {"arccos": 2 / math.pi, "root": 1 / 3, "linear": 1 / 2, "square": 2 / 3, "cosine": 2 / math.pi}


@pytest.mark.parametrize("steps", PUBLISHED)
def test_codes_of_each_step_are_the_published_ones(steps):
    counts = np.diff(decoded_counts(steps, 1024), prepend=0)
    assert counts.tolist() == [int(count) for count in PUBLISHED[steps].split()]


@pytest.mark.parametrize("codes", [1, 7, 256, 576, 1024])
@pytest.mark.parametrize("steps", [1, 2, 7, 32, 1000, 2000])
def test_counts_of_any_size_follow_the_formula_and_end_with_all_codes(steps, codes):
    counts = decoded_counts(steps, codes)
    assert len(counts) == steps
    assert counts[-1] == codes
    assert (np.diff(counts, prepend=0) >= (np.arange(1, steps + 1) <= codes)).all()  # one code at least
    for k in range(1, steps + 1):
        share = Fraction(1, 3) if 2 * k == steps else 2 / math.pi * math.asin(k / steps)
        assert counts[k - 1] == min(codes, max(k, int(codes * share)))


@pytest.mark.parametrize("schedule", MEANS)
def test_ratios_fall_from_1_to_0_with_the_mean_of_their_integral(schedule):
    u = stratified_uniform(0, np.arange(4096), 4096, "u")
    ratios = mask_ratio(schedule, u)
    assert ratios.dtype == np.float64
    assert (np.diff(ratios) < 0).all()
    assert ratios.mean() == pytest.approx(MEANS[schedule], abs=1e-4)
    np.testing.assert_allclose(mask_ratio(schedule, np.array([0.0, 1.0])), [1.0, 0.0], atol=1e-15)


def test_ratios_are_those_of_the_papers():
    expected: dict[Any, float] = {
        "arccos": 2 / 3,  # arccos(1/2) = pi/3
        "root": 1 - math.sqrt(0.5),
        "linear": 0.5,
        "square": 0.75,
        "cosine": math.sqrt(0.5),
    }
    for schedule, ratio in expected.items():
        assert mask_ratio(schedule, np.array([0.5])) == pytest.approx(ratio)
