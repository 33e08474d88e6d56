"""Every form's mean loss, summed over all masks and integrated over time, against its closed form.

The draws are replaced: the times by quadrature nodes, the coins by every subset, weighted with the probability
that the objective asked for. What is tested is the objectives' own probabilities and weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.polynomial import Polynomial

from pgm_scale.config import (
    ComplementaryMDLMObjectiveConfig,
    MDLMObjectiveConfig,
    ObjectiveConfig,
    PGMObjectiveConfig,
)
from pgm_scale.objectives import DrawSpec, base, build_objective, complementary_mdlm, loss_terms, mdlm, pgm
from tests.objectives.tiny import (
    ALL_SUBSETS,
    LENGTH,
    VOCABULARY,
    MaskedTable,
    PartitionTable,
    any_order_nll,
    bound_F,
    copies,
    cost_A,
    mean_cost_over_probability,
    probability_of,
)

E, S = 1e-3, 1e-3  # the schedule's epsilon and the minimum time
SUBSETS = len(ALL_SUBSETS)


def loss_of_sequences(objective: Any, model: Any, inputs: Any, count: int) -> np.ndarray:
    """float64 [count] loss sums; rows of one sequence are added."""
    terms = loss_terms(objective, model, inputs)
    return np.bincount(terms.sequence_S, weights=terms.loss_S.detach().double().numpy(), minlength=count)


def mean_over_coins(
    monkeypatch: pytest.MonkeyPatch, config: ObjectiveConfig, model: Any, times: np.ndarray, inputs_of: str
) -> np.ndarray:
    """E[loss | u] over all outcomes of the coins, for each u of `times`."""
    asked: list[np.ndarray] = []

    def every_subset(
        seed: int, numbers_B: np.ndarray, stream: str, p_B: np.ndarray, length: int
    ) -> np.ndarray:
        asked.append(p_B)
        return ALL_SUBSETS[numbers_B % SUBSETS]

    for name in ("stratified_uniform", "sequential_uniform"):
        monkeypatch.setattr(base, name, lambda *_: np.repeat(times, SUBSETS))
    for module in (pgm, mdlm, complementary_mdlm):
        monkeypatch.setattr(module, "bernoulli_mask", every_subset)
    batch = copies(len(times) * SUBSETS)
    objective = build_objective(config, VOCABULARY)
    inputs = getattr(objective, inputs_of)(batch, DrawSpec(1, 8))
    losses = loss_of_sequences(objective, model, inputs, len(batch.tokens_BL))
    coins = probability_of(np.tile(ALL_SUBSETS, (len(times), 1)), asked[0])
    return (losses * coins).reshape(len(times), SUBSETS).sum(axis=1)


def integral(mean_at: Callable[[np.ndarray], np.ndarray]) -> float:
    """int_0^1 mean_at(u) du, exact for a polynomial of low degree."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    return float(weights @ mean_at((nodes + 1) / 2)) / 2


def test_any_order_and_masked_diffusion_bounds_are_the_same():
    by_size = sum(
        np.mean([cost_A(in_S) for in_S in ALL_SUBSETS if in_S.sum() == n]) / n for n in range(1, LENGTH + 1)
    )
    assert by_size == pytest.approx(any_order_nll(), rel=1e-12)
    assert bound_F(0, 1) == pytest.approx(any_order_nll(), rel=1e-12)


def test_count_form_is_the_exact_bound(monkeypatch):
    per_size = 5
    sizes = LENGTH + 1
    u = (np.arange(per_size * sizes) + 0.5) / (per_size * sizes)
    by_size = [ALL_SUBSETS[ALL_SUBSETS.sum(axis=1) == n] for n in range(sizes)]
    most = 3  # at most three subsets of a size; smaller counts divide it

    def subset_of_size(
        seed: int, numbers_B: np.ndarray, stream: str, size_B: np.ndarray, length: int
    ) -> np.ndarray:
        assert np.bincount(size_B).tolist() == [per_size * most] * sizes  # every size equally often
        return np.stack([by_size[n][b % len(by_size[n])] for n, b in zip(size_B, numbers_B, strict=True)])

    monkeypatch.setattr(pgm, "stratified_uniform", lambda *_: np.repeat(u, most))
    monkeypatch.setattr(pgm, "uniform_subset", subset_of_size)
    objective = build_objective(PGMObjectiveConfig(form="count"), VOCABULARY)
    batch = copies(len(u) * most)
    inputs = objective.training_inputs(batch, DrawSpec(1, 8))
    losses = loss_of_sequences(objective, PartitionTable(), inputs, len(batch.tokens_BL))
    assert losses.mean() == pytest.approx(any_order_nll(), rel=1e-6)


def closed_form_bounded() -> float:
    return (bound_F((1 - E) * S, 1 - E) + bound_F(E, 1 - (1 - E) * S)) / (2 * (1 - S))


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (PGMObjectiveConfig(form="bounded"), PartitionTable()),
        (ComplementaryMDLMObjectiveConfig(), MaskedTable()),
    ],
    ids=["pgm", "complementary_mdlm"],
)
def test_bounded_weights_give_the_truncated_bound(monkeypatch, config, model):
    mean = integral(lambda u: mean_over_coins(monkeypatch, config, model, u, "training_inputs"))
    assert mean == pytest.approx(closed_form_bounded(), rel=1e-6)
    assert mean == pytest.approx(any_order_nll(), rel=5 * (E + S))


@pytest.mark.parametrize("cut", [1e-2, 1e-4])
def test_published_weights_have_the_derived_excess(monkeypatch, cut):
    """With times up to 1 - cut: the excess in closed form, with its logarithm."""
    published, bounded = (
        _integral_up_to(cut, partial(_pgm_mean_at, monkeypatch, PGMObjectiveConfig(form=form)))
        for form in ("published", "bounded")
    )
    # e / (2 (1-s)) int_s^{1-cut} P(1 - (1-e) t) / (1-t) dt, with P the polynomial (1/q) E A. In x = 1-t,
    # P(e + (1-e) x) / x = P(e) / x + a polynomial.
    in_x = mean_cost_over_probability()(Polynomial([E, 1 - E]))
    smooth = Polynomial(in_x.coef[1:]).integ()
    integral_in_x = in_x.coef[0] * np.log((1 - S) / cut) + smooth(1 - S) - smooth(cut)
    excess = E / (2 * (1 - S)) * integral_in_x
    assert excess > 2e-3  # far above the tolerance
    assert published - bounded == pytest.approx(excess, abs=2e-6)


def _pgm_mean_at(monkeypatch: pytest.MonkeyPatch, config: PGMObjectiveConfig, u: np.ndarray) -> np.ndarray:
    return mean_over_coins(monkeypatch, config, PartitionTable(), u, "training_inputs")


def _integral_up_to(cut: float, mean_at: Callable[[np.ndarray], np.ndarray]) -> float:
    """int over u of mean_at(u) where t = S + (1-S) u <= 1 - cut, with nodes even in log(1 - t)."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    low, high = np.log(cut), np.log(1 - S)
    x = np.exp(low + (nodes + 1) / 2 * (high - low))
    u = (1 - x - S) / (1 - S)
    return float((weights * x) @ mean_at(u)) * (high - low) / 2 / (1 - S)


def test_published_weight_is_finite_at_the_last_time(monkeypatch):
    largest = np.array([np.nextafter(1.0, 0.0)])
    config = PGMObjectiveConfig(form="published", minimum_time=0.2)  # 0.2 + 0.8 u rounds to 1
    mean = _pgm_mean_at(monkeypatch, config, largest)
    assert np.isfinite(mean).all()


@pytest.mark.parametrize("inputs_of", ["training_inputs", "validation_inputs"])
def test_mdlm_in_continuous_time_is_the_truncated_bound(monkeypatch, inputs_of):
    mean = integral(
        lambda u: mean_over_coins(monkeypatch, MDLMObjectiveConfig(), MaskedTable(), u, inputs_of)
    )
    assert mean == pytest.approx(bound_F((1 - E) * S, 1 - E) / (1 - S), rel=1e-6)


@pytest.mark.parametrize("form", ["published", "bounded", "count"])
def test_pgm_validation_is_the_bound_of_mdlm(monkeypatch, form):
    config = PGMObjectiveConfig(form=form)
    mean = integral(lambda u: mean_over_coins(monkeypatch, config, PartitionTable(), u, "validation_inputs"))
    assert mean == pytest.approx(bound_F((1 - E) * S, 1 - E) / (1 - S), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 7])
def test_mdlm_in_discrete_time_sums_over_its_steps(monkeypatch, steps):
    config = MDLMObjectiveConfig(diffusion_steps=steps)
    u = (np.arange(steps)[:, None] + [0.0005, 0.5, 0.9995]).ravel() / steps  # each step three times
    mean = mean_over_coins(monkeypatch, config, MaskedTable(), u, "training_inputs").mean()
    # T (alpha_s - alpha_t) / (1 - alpha_t) E A = T (1-e)/T * (E A / q) at q = (1-e) t
    t = np.arange(1, steps + 1) / steps
    expected = ((1 - E) * mean_cost_over_probability()((1 - E) * t)).mean()
    assert mean == pytest.approx(expected, rel=1e-6)


def test_low_variance_weights_masked_tokens_with_one_and_leaves_validation_alone(monkeypatch):
    low = MDLMObjectiveConfig(loss="low_variance")
    t = np.array([0.25])
    u = (t - S) / (1 - S)
    mean = mean_over_coins(monkeypatch, low, MaskedTable(), u, "training_inputs")
    q = (1 - E) * t
    np.testing.assert_allclose(mean, q * mean_cost_over_probability()(q), rtol=1e-6)
    np.testing.assert_allclose(
        mean_over_coins(monkeypatch, low, MaskedTable(), u, "validation_inputs"),
        mean_over_coins(monkeypatch, MDLMObjectiveConfig(), MaskedTable(), u, "validation_inputs"),
    )
