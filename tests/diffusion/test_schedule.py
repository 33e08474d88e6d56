import numpy as np
import pytest
import torch

from pgm_scale.diffusion.schedule import LogLinearSchedule

schedule = LogLinearSchedule()
times = np.linspace(0.01, 0.99, 9)


def test_values_at_the_ends():
    assert schedule.alpha(0.0) == 1.0
    assert schedule.alpha(1.0) == pytest.approx(1e-3)
    assert schedule.sigma(1.0) == pytest.approx(-np.log(1e-3))


def test_derivative_and_weights_follow_from_alpha():
    step = 1e-6
    slope = (schedule.alpha(times + step) - schedule.alpha(times - step)) / (2 * step)
    np.testing.assert_allclose(schedule.alpha_derivative(times), slope, rtol=1e-6)
    np.testing.assert_allclose(schedule.weight(times), -slope / (1 - schedule.alpha(times)), rtol=1e-6)
    np.testing.assert_allclose(schedule.complement_weight(times), -slope / schedule.alpha(times), rtol=1e-6)


def test_sigma_keeps_small_times_exact():
    assert schedule.sigma(1e-12) == pytest.approx(0.999e-12, rel=1e-9)


@pytest.mark.parametrize(
    "method", ["alpha", "alpha_derivative", "sigma", "mask_probability", "weight", "complement_weight"]
)
def test_torch_and_numpy_agree_and_keep_their_type(method):
    function = getattr(schedule, method)
    from_torch = function(torch.from_numpy(times))
    assert isinstance(from_torch, torch.Tensor)
    np.testing.assert_allclose(from_torch.numpy(), function(times), rtol=1e-12)
