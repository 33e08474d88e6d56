"""The implemented loss against explicit transition matrices (FACTS 3.5)."""

import numpy as np
import pytest
import torch

from pgm_scale.config import D3PMObjectiveConfig, MDLMObjectiveConfig
from pgm_scale.objectives import DrawSpec, base, build_objective, d3pm, loss_terms, mdlm
from pgm_scale.objectives.d3pm import absorbing_kl
from tests.objectives.tiny import ALL_SUBSETS, LENGTH, VOCABULARY, MaskedTable, copies, probability_of

STEPS, V, MASK = 6, 4, 3  # a tiny vocabulary: three tokens and the mask


def transition(k: int) -> np.ndarray:
    """[V, V] row-stochastic Q_k = (1 - beta) I + beta 1 e_m^T, with beta such that prod(1 - beta) = 1 - k/T."""
    beta = 1 / (STEPS - k + 1)
    matrix = (1 - beta) * np.eye(V)
    matrix[:, MASK] += beta
    return matrix


def cumulative(k: int) -> np.ndarray:
    """[V, V] Q_1 Q_2 ... Q_k."""
    product = np.eye(V)
    for step in range(1, k + 1):
        product = product @ transition(step)
    return product


def joint(k: int, noisy: int) -> np.ndarray:
    """[x0, x_s] q(x_s, x_t = noisy | x0) with t = k/T and s = (k-1)/T."""
    return cumulative(k - 1) * transition(k)[:, noisy]


def brute_kl(k: int, x0: int, noisy: int, prediction: np.ndarray) -> float:
    """KL(q(x_s | x_t, x0) || sum over x~ of q(x_s, x_t | x~) prediction(x~), normalised)."""
    posterior = joint(k, noisy)[x0]
    posterior = posterior / posterior.sum()
    reverse = prediction @ joint(k, noisy)
    reverse = reverse / reverse.sum()
    kept = posterior > 0
    return float((posterior[kept] * np.log(posterior[kept] / reverse[kept])).sum())


def prediction_with(mask_probability: float) -> np.ndarray:
    tokens = np.array([0.5, 0.2, 0.3]) * (1 - mask_probability)
    return np.append(tokens, mask_probability)


@pytest.mark.parametrize("k", range(1, STEPS + 1))
def test_cumulative_matrix_and_posterior_have_their_closed_form(k):
    a_t, a_s = 1 - k / STEPS, 1 - (k - 1) / STEPS
    expected = a_t * np.eye(V)
    expected[:, MASK] += 1 - a_t
    np.testing.assert_allclose(cumulative(k), expected, atol=1e-12)
    for x0 in range(V - 1):
        from_mask = joint(k, MASK)[x0] / joint(k, MASK)[x0].sum()
        assert from_mask[MASK] == pytest.approx((1 - a_s) / (1 - a_t))
        assert from_mask[x0] == pytest.approx((a_s - a_t) / (1 - a_t))


@pytest.mark.parametrize("mask_probability", [0.0, 1e-6, 0.4, 1 - 1e-9])
@pytest.mark.parametrize("k", range(1, STEPS + 1))
def test_closed_form_kl_is_that_of_the_matrices(k, mask_probability):
    prediction = prediction_with(mask_probability)
    t, s = torch.tensor(k / STEPS, dtype=torch.float64), torch.tensor((k - 1) / STEPS, dtype=torch.float64)
    for x0 in range(V - 1):
        nll = -torch.tensor(prediction[x0]).log()
        closed = float(absorbing_kl(nll, torch.tensor(mask_probability, dtype=torch.float64), t, s))
        assert closed == pytest.approx(brute_kl(k, x0, MASK, prediction), rel=1e-7, abs=1e-9)
        if k < STEPS:  # at the last step no token is visible
            assert brute_kl(k, x0, x0, prediction) == pytest.approx(0, abs=1e-9)


def test_kl_keeps_its_digits_in_fp32_times_a_thousand_steps():
    steps = 1000
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    mask_probability = torch.tensor([1e-4, 0.3, 0.999], dtype=torch.float64)[:, None]
    arguments = (torch.tensor(2.0, dtype=torch.float64), mask_probability, k / steps, (k - 1) / steps)
    exact = steps * absorbing_kl(*arguments)
    single = steps * absorbing_kl(*(a.float() for a in arguments))
    np.testing.assert_allclose(single, exact, rtol=3e-4)


def test_kl_has_finite_gradients_at_the_first_step_and_at_a_certain_mask():
    nll = torch.tensor(3.0, requires_grad=True)
    mask_probability = torch.tensor([0.0, 1.0], requires_grad=True)
    absorbing_kl(nll, mask_probability, torch.tensor(1e-3), torch.tensor(0.0)).sum().backward()
    assert nll.grad is not None
    assert mask_probability.grad is not None
    assert nll.grad.isfinite()
    assert mask_probability.grad.isfinite().all()


def mean_loss(monkeypatch, config, model, inputs_of: str) -> float:
    """The loss averaged over the T steps and over every mask with its probability."""
    steps = config.diffusion_steps
    times = np.repeat((np.arange(steps) + 0.5) / steps, len(ALL_SUBSETS))
    asked = []

    def every_subset(seed, numbers_B, stream, p_B, length):
        asked.append(p_B)
        return ALL_SUBSETS[numbers_B % len(ALL_SUBSETS)]

    for name in ("stratified_uniform", "sequential_uniform"):
        monkeypatch.setattr(base, name, lambda *_: times)
    for module in (d3pm, mdlm):
        monkeypatch.setattr(module, "bernoulli_mask", every_subset)
    batch = copies(len(times))
    objective = build_objective(config, VOCABULARY)
    terms = loss_terms(objective, model, getattr(objective, inputs_of)(batch, DrawSpec(1, 4)))
    coins = probability_of(np.tile(ALL_SUBSETS, (steps, 1)), asked[0])
    return float((terms.loss_S.detach().double().numpy() * coins).sum() / steps)


def log_prediction(model: MaskedTable, noisy_L: np.ndarray, mask_allowed: bool) -> np.ndarray:
    """float64 [L, V] log x_theta."""
    logits_LV = model.logits_of(torch.from_numpy(noisy_L)[None])[0].detach()
    if not mask_allowed:
        logits_LV[:, VOCABULARY.mask_id] = -torch.inf
    return logits_LV.log_softmax(dim=-1).numpy()


def brute_bound(model: MaskedTable, steps: int, extra: float) -> float:
    """Sum over steps of the mean KL, the reconstruction, and `extra` times the cross-entropy."""
    clean = copies(1).tokens_BL[0]
    total = -log_prediction(model, clean, True)[np.arange(LENGTH), clean].sum()
    for k in range(1, steps + 1):
        t, s = min(k / steps, 1 - 1e-4), (k - 1) / steps
        for masked in ALL_SUBSETS:
            chance = np.where(masked, t, 1 - t).prod()
            x = np.exp(log_prediction(model, np.where(masked, VOCABULARY.mask_id, clean), True))
            for i in range(LENGTH):
                p_x0, p_m = x[i, clean[i]], x[i, VOCABULARY.mask_id]
                total += chance * extra * -np.log(p_x0) / steps
                if masked[i]:
                    reverse_stay = (p_m + (1 - p_m) * s) / (p_m + (1 - p_m) * t)
                    reverse_x0 = p_x0 * (t - s) / (p_m + (1 - p_m) * t)
                    total += chance * (t - s) / t * np.log((t - s) / t / reverse_x0)
                    total += chance * s / t * np.log(s / t / reverse_stay) if s else 0.0
    return total


@pytest.mark.parametrize("steps", [1, 5])
def test_mean_loss_is_the_bound(monkeypatch, steps):
    model = MaskedTable()
    config = D3PMObjectiveConfig(diffusion_steps=steps, cross_entropy_weight=0.7)
    assert mean_loss(monkeypatch, config, model, "training_inputs") == pytest.approx(
        brute_bound(model, steps, 0.7), rel=1e-5
    )
    assert mean_loss(monkeypatch, config, model, "validation_inputs") == pytest.approx(
        brute_bound(model, steps, 0.0), rel=1e-5
    )


def test_substitution_is_the_discrete_mdlm_bound(monkeypatch):
    """T (alpha_s - alpha_t) / (1 - alpha_t) CE, which differs from MDLM's only by the schedule's epsilon."""
    model = MaskedTable()
    substituted = D3PMObjectiveConfig(diffusion_steps=8, substitution=True)
    masked = MDLMObjectiveConfig(diffusion_steps=8)
    assert mean_loss(monkeypatch, substituted, model, "training_inputs") == pytest.approx(
        mean_loss(monkeypatch, masked, model, "training_inputs"), rel=3e-3
    )


def test_the_model_is_called_once_with_clean_rows_at_noise_level_zero():
    calls = []
    table = MaskedTable()

    def model(tokens_BL, sigma_B, readout):
        calls.append((tokens_BL, sigma_B))
        return table(tokens_BL, sigma_B, readout)

    batch = copies(4)
    objective = build_objective(D3PMObjectiveConfig(diffusion_steps=4), VOCABULARY)
    terms = loss_terms(objective, model, objective.training_inputs(batch, DrawSpec(1, 4)))
    ((tokens_SL, sigma_S),) = calls
    np.testing.assert_array_equal(tokens_SL[4:], batch.tokens_BL)
    np.testing.assert_array_equal(sigma_S[4:], np.zeros(4))
    np.testing.assert_allclose(sigma_S[:4], -np.log1p(-np.array([0.25, 0.5, 0.75, 1 - 1e-4])), rtol=1e-5)
    masked = tokens_SL[:4].numpy() == VOCABULARY.mask_id
    np.testing.assert_array_equal(terms.scored_tokens_S, masked.sum(axis=1))
