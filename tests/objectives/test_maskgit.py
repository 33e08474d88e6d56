"""MaskGIT's objective by hand: which codes are masked, which labels dropped, what is scored and how."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import MaskGITObjectiveConfig, MaskGITTransformerConfig
from pgm_scale.data import TokenBatch, Vocabulary
from pgm_scale.diffusion.draws import sequential_uniform, stratified_uniform
from pgm_scale.errors import UserError
from pgm_scale.objectives import DrawSpec, build_objective, loss_terms
from pgm_scale.objectives.maskgit import MaskedImageInputs, MaskGITObjective
from tests.models.builders import CLASSES, LENGTH, VOCAB, maskgit_config, randomised

MASK, BOS = VOCAB - 2, VOCAB - 1
VOCABULARY = Vocabulary(size=VOCAB, mask_id=MASK, bos_id=BOS, eos_id=BOS, pad_id=None)
MODEL = maskgit_config()
CODES = 400  # of the large batches, so that shares are near their expectation


def objective(**settings: Any) -> MaskGITObjective:
    built = build_objective(MaskGITObjectiveConfig(**settings), VOCABULARY, MODEL)
    assert isinstance(built, MaskGITObjective)
    return built


def images(count: int, codes: int = LENGTH - 1, first: int = 0) -> TokenBatch:
    """The images of consecutive sample numbers: their codes and labels depend on the number alone."""
    numbers_B = np.arange(first, first + count)
    rows = [np.random.default_rng(int(n)).integers(0, MASK, 1 + codes) for n in numbers_B]
    tokens_BL = np.stack(rows)
    tokens_BL[:, 0] = BOS
    return TokenBatch(tokens_BL, np.ones_like(tokens_BL, bool), numbers_B, numbers_B % CLASSES)


SPEC = DrawSpec(seed=7, global_batch_sequences=64)
BATCH = images(64, CODES)


def masked(inputs: MaskedImageInputs) -> np.ndarray:
    return (inputs.noisy_BL[:, 1:] == MASK).numpy()


@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [
        ("arccos", lambda u: 2 / math.pi * np.arccos(u)),
        ("root", lambda u: 1 - np.sqrt(u)),
        ("linear", lambda u: 1 - u),
        ("square", lambda u: 1 - u**2),
        ("cosine", lambda u: np.cos(math.pi * u / 2)),
    ],
)
def test_a_code_is_masked_with_the_probability_of_the_schedule(schedule: str, ratio: Any) -> None:
    target = objective(mask_schedule=schedule)
    drawn = {
        "training": (
            target.training_inputs(BATCH, SPEC),
            stratified_uniform(SPEC.seed, BATCH.sample_numbers_B, 64, "training/time"),
        ),
        "validation": (
            target.validation_inputs(BATCH, SPEC),
            sequential_uniform(SPEC.seed, BATCH.sample_numbers_B, "validation/time"),
        ),
    }
    for inputs, u_B in drawn.values():
        expected_B = ratio(u_B)
        spread_B = np.sqrt(expected_B * (1 - expected_B) / CODES)
        found_B = masked(inputs).mean(axis=1)
        assert (np.abs(found_B - expected_B) <= 4.5 * spread_B + 1e-12).all()
        np.testing.assert_array_equal(inputs.rows.mask_fraction_S, found_B)
        # What is not masked is the data, BOS included.
        noisy_BL = inputs.noisy_BL.numpy()
        assert (noisy_BL[:, 0] == BOS).all()
        is_masked_BL = np.pad(masked(inputs), ((0, 0), (1, 0)))
        np.testing.assert_array_equal(noisy_BL, np.where(is_masked_BL, MASK, BATCH.tokens_BL))
    assert (masked(drawn["training"][0]) != masked(drawn["validation"][0])).any()


def test_labels_are_dropped_in_training_only() -> None:
    batch = images(2000, 4)
    given_B: Any = batch.labels_B
    target = objective(label_drop=0.3)
    labels_B = target.training_inputs(batch, SPEC).classes_B.numpy()
    is_dropped_B = labels_B == CLASSES
    assert is_dropped_B.mean() == pytest.approx(0.3, abs=0.05)
    np.testing.assert_array_equal(labels_B[~is_dropped_B], given_B[~is_dropped_B])
    np.testing.assert_array_equal(target.validation_inputs(batch, SPEC).classes_B, given_B)
    np.testing.assert_array_equal(objective(label_drop=0.0).training_inputs(batch, SPEC).classes_B, given_B)
    assert (objective(label_drop=1.0).training_inputs(batch, SPEC).classes_B == CLASSES).all()


@pytest.mark.parametrize("inputs_of", ["training_inputs", "validation_inputs"])
def test_the_loss_is_the_cross_entropy_of_every_code_without_the_mask(inputs_of: str) -> None:
    """Visible codes count as the masked ones do; a row that is not scored, as validation's last, does not."""
    target, model = objective(), randomised(MODEL)
    batch = images(6)
    batch.valid_BL[5] = False
    inputs = getattr(target, inputs_of)(batch, SPEC)
    assert 0 < masked(inputs).mean() < 1
    terms = loss_terms(target, model, inputs)
    log_p = model(inputs.noisy_BL, inputs.classes_B).detach().double()[..., :MASK].log_softmax(-1)
    for b in range(5):
        nll = [-float(log_p[b, i, batch.tokens_BL[b, 1 + i]]) for i in range(LENGTH - 1)]
        assert float(terms.loss_S[b].detach()) == pytest.approx(sum(nll), rel=1e-5)
        assert terms.cross_entropy_S is not None
        assert float(terms.cross_entropy_S[b]) == pytest.approx(sum(nll), rel=1e-5)
    assert float(terms.loss_S[5].detach()) == 0
    np.testing.assert_array_equal(terms.scored_tokens_S, [LENGTH - 1] * 5 + [0])
    np.testing.assert_array_equal(target.scored_tokens(batch), terms.scored_tokens_S)
    terms.loss_S.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("inputs_of", ["training_inputs", "validation_inputs"])
def test_inputs_of_an_image_do_not_depend_on_how_the_batch_is_cut(inputs_of: str) -> None:
    target = objective(label_drop=0.5)
    whole = getattr(target, inputs_of)(images(12, first=24), SPEC)
    parts = [getattr(target, inputs_of)(images(n, first=f), SPEC) for f, n in ((24, 5), (29, 1), (30, 6))]
    for name in ("noisy_BL", "classes_B", "targets_BK"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    other = getattr(target, inputs_of)(dataclasses.replace(images(12, first=24)), DrawSpec(8, 64))
    assert not torch.equal(other.noisy_BL, whole.noisy_BL)


def test_it_is_no_likelihood() -> None:
    assert objective().is_likelihood is False


def test_data_without_labels_or_with_too_many_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="no labels") as without:
        objective().training_inputs(dataclasses.replace(BATCH, labels_B=None), SPEC)
    few = MaskGITTransformerConfig(num_classes=CLASSES - 1)
    with pytest.raises(UserError, match=r"model\.num_classes is 4") as beyond:
        build_objective(MaskGITObjectiveConfig(), VOCABULARY, few).training_inputs(BATCH, SPEC)
    assert "\n" not in f"{without.value}{beyond.value}"
