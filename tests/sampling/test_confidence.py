from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import PartitionTransformerConfig, SamplerConfig
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models.vocabulary import VocabularyLinear
from pgm_scale.sampling import sample
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.categorical import ScoredTokenDraw, TokenDraw, TokenRules
from pgm_scale.sampling.confidence import choice_noise, kept_counts, surest
from tests.sampling.chi_square import p_value
from tests.sampling.exact import LENGTH as EXACT_LENGTH
from tests.sampling.exact import ExactPartition, conditionals, joint_distribution, sequences
from tests.sampling.image_models import (
    CLASSES,
    CODES,
    MASK,
    MODELS,
    assert_any_batch_split_gives_the_same,
    batch_of,
    generate,
    guided_probabilities,
    image_model,
    known_images,
    ramp,
    shown,
    token_at,
)

CONFIDENCE = SamplerConfig(kind="confidence", steps=6)


def published_counts(codes: int, steps: int, starts_with_one: bool) -> list[int]:
    """Codes kept at each step, FACTS 2.3: the increments; PGM has one code first and the rest at last."""
    if steps == 1:
        return [codes]
    after = [shown(codes, k / (steps - 1)) for k in range(steps)]
    counts = [int(starts_with_one), *(b - a for a, b in itertools.pairwise(after))]
    counts[-1] = codes - sum(counts[:-1])
    return counts


@pytest.mark.parametrize(("codes", "steps"), [(1024, 32), (1024, 8), (16, 6), (5, 2), (3, 1), (7, 7)])
@pytest.mark.parametrize("starts_with_one", [False, True])
def test_numbers_of_codes_a_step(codes, steps, starts_with_one):
    kept_BK = kept_counts(np.array([codes]), np.array([steps]), starts_with_one)
    assert kept_BK.tolist() == [published_counts(codes, steps, starts_with_one)]


def test_rows_with_fewer_unknown_codes_take_fewer_steps():
    kept_BK = kept_counts(np.array([16, 3, 0]), np.array([6, 3, 0]), starts_with_one=True)
    assert kept_BK.sum(axis=1).tolist() == [16, 3, 0]
    assert kept_BK[1].tolist() == [1, 1, 1, 0, 0, 0]


def oracle(model: Any, batch: SamplingBatch, row: int, is_pgm: bool) -> np.ndarray:
    """One image, all logits by full passes, a sort of Python numbers."""
    config, label = batch.config, int(batch.labels_B[row])  # type: ignore[index]
    masked_L = batch.known_BL[row] < 0
    tokens_L = np.where(masked_L, MASK, batch.known_BL[row])
    steps = min(config.steps, int(masked_L.sum()))
    for number, count in enumerate(published_counts(int(masked_L.sum()), steps, is_pgm) if steps else []):
        temperature = config.temperature * (2 if number < config.temperature_warmup_steps else 1)
        weight = ramp(config, number, steps)
        shares_LV = guided_probabilities(model, tokens_L, masked_L, label, weight, temperature)
        uniforms_L = batch.uniforms_BL(f"token.step{number}")[row]
        noise_L = batch.uniforms_BL(f"choice.step{number}")[row]
        drawn: dict[int, tuple[float, int]] = {}
        for position in np.flatnonzero(masked_L).tolist():
            token = token_at(shares_LV[position], uniforms_L[position])
            cooling = 1 - number / (steps - 1) if steps > 1 else 1
            gumbel = -math.log(-math.log(noise_L[position]))
            confidence = math.log(shares_LV[position, token]) + config.choice_temperature * cooling * gumbel
            drawn[position] = (confidence, token)
        kept = sorted(drawn, key=lambda position: drawn[position][0], reverse=True)[:count]
        for position in kept:
            tokens_L[position] = drawn[position][1]
        masked_L[kept] = False
    return tokens_L


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance": 2.0, "temperature_warmup_steps": 2, "choice_temperature": 1.0},
        {"guidance": 1.5, "guidance_schedule": "constant", "steps": 3, "choice_temperature": 0.0},
        {"guidance": 3.0, "steps": 1},
        {"steps": 40},
    ],
)
def test_confidence_sampling_equals_a_slow_oracle_token_by_token(name, changes):
    model, config = image_model(name), replace(CONFIDENCE, **changes)
    known_BL, labels = known_images([CODES, CODES, 9, 1, 0, 9]), [0, 2, 1, 0, 2, CLASSES]
    result = generate(model, known_BL, labels, config)
    batch = batch_of(known_BL, labels, config)
    for row, tokens_L in enumerate(result.tokens_BL):
        np.testing.assert_array_equal(tokens_L, oracle(model, batch, row, is_pgm=name == "pgm"))
    assert result.forward_passes <= config.steps


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_the_same_grids_at_any_batch_split(name):
    assert_any_batch_split_gives_the_same(image_model(name), replace(CONFIDENCE, guidance=1.0))


def test_equal_confidences_fall_by_position():
    confidence_BL = np.array([[9.0, 1.0, 2.0, 1.0, 1.0], [0.0, 0.0, -np.inf, 0.0, 0.0]])
    candidate_BL = np.array([[False, True, True, True, True], [False, True, True, True, True]])
    assert surest(confidence_BL, candidate_BL, np.array([3, 2])).tolist() == [
        [False, True, True, True, False],
        [False, True, False, True, False],
    ]
    assert surest(confidence_BL, candidate_BL, np.array([0, 4])).sum(axis=1).tolist() == [0, 4]


def test_the_noise_is_gumbel_and_cools_to_nothing():
    known_BL, config = np.full((400, 17), -1), replace(CONFIDENCE, choice_temperature=2.0)
    batch = batch_of(known_BL, [0] * 400, config)
    values = choice_noise(batch, 0, np.full(400, 6))
    assert values.mean() == pytest.approx(2 * np.euler_gamma, abs=0.1)
    assert values.std() == pytest.approx(2 * math.pi / math.sqrt(6), abs=0.1)
    assert (choice_noise(batch, 5, np.full(400, 6)) == 0).all()
    again = batch_of(known_BL[:1], [0], config)
    np.testing.assert_array_equal(choice_noise(again, 0, np.array([6]))[0], values[0])


def test_dropout_is_on_only_as_a_quirk():
    """FACTS 8.15; with it a seed still gives the same images, but others than without."""
    known_BL, labels = known_images([CODES] * 3), [0, 1, 2]
    quirky = replace(CONFIDENCE, quirks=("dropout",))
    without = generate(image_model("pgm"), known_BL, labels, CONFIDENCE).tokens_BL
    model = image_model("pgm", dropout=0.5).train()
    np.testing.assert_array_equal(generate(model, known_BL, labels, CONFIDENCE).tokens_BL, without)
    before = torch.get_rng_state()
    dropped = generate(model, known_BL, labels, quirky).tokens_BL
    assert torch.equal(torch.get_rng_state(), before)
    assert (dropped != without).any()
    np.testing.assert_array_equal(generate(model, known_BL, labels, quirky).tokens_BL, dropped)
    np.testing.assert_array_equal(generate(image_model("pgm"), known_BL, labels, quirky).tokens_BL, without)
    assert model.training


def test_the_register_offset_changes_confidence_sampling_too():
    known_BL, labels = known_images([CODES] * 3), [0, 1, 2]
    right = generate(image_model("pgm"), known_BL, labels, CONFIDENCE).tokens_BL
    quirky = replace(CONFIDENCE, quirks=("register_offset",))
    assert (generate(image_model("pgm"), known_BL, labels, quirky).tokens_BL != right).any()


@pytest.mark.parametrize("rules", [{}, {"top_k": 3, "temperature": 0.5}, {"top_p": 0.7}])
def test_scored_draws_are_those_of_the_plain_draw_with_their_log_probabilities(rules):
    torch.manual_seed(0)
    linear, hidden_QH = VocabularyLinear(8, 6), torch.randn(300, 8)  # two chunks
    token_rules = TokenRules((5, 4, 9), **rules)
    uniforms_Q = torch.rand(300, dtype=torch.float64)
    with torch.inference_mode():
        tokens_Q, scores_Q = ScoredTokenDraw(token_rules, uniforms_Q)(hidden_QH, linear)
        assert torch.equal(tokens_Q.long(), TokenDraw(token_rules, uniforms_Q)(hidden_QH, linear))
        weights_QV = token_rules(linear(hidden_QH)).double()
    assert (weights_QV[:, 4:] == 0).all()
    expected_Q = (
        (weights_QV / weights_QV.sum(dim=1, keepdim=True)).gather(1, tokens_Q.long()[:, None])[:, 0].log()
    )
    torch.testing.assert_close(scores_Q, expected_Q, atol=1e-5, rtol=1e-5)


class ExactCodes(ExactPartition):
    """The exact conditionals of three codes, of one class, behind a BOS that is no code."""

    def __init__(self, joint: np.ndarray) -> None:
        super().__init__(joint)
        self.config = PartitionTransformerConfig(num_classes=1)
        self.vocab_size = 5

    def forward(self, inputs: Any, readout: Any = None, received: Any = None) -> Any:
        without_bos = inputs.tokens_T.masked_fill(inputs.tokens_T == 4, 0)
        return super().forward(replace(inputs, tokens_T=without_bos), readout)


def confidence_law(joint: np.ndarray, choice_temperature: float) -> np.ndarray:
    """Exact law of three codes in three steps, one code a step.

    All masked codes are drawn, and one of them is kept: by the Gumbel-max rule, i with a probability in proportion
    to p_i ** (1 / T), p_i being the probability of what was drawn. T falls linearly to 0.
    """
    table, places = conditionals(joint), 4 ** np.arange(4)
    law: dict[tuple[int, ...], float] = {(0, 3, 3, 3): 1.0}
    for temperature in (choice_temperature, choice_temperature / 2, 0.0):
        following: dict[tuple[int, ...], float] = {}
        for state, weight in law.items():
            masked = [position for position, token in enumerate(state) if token == 3]
            shares = [table[np.array(state) @ places, position, :3] for position in masked]
            for drawn in np.ndindex(*[3] * len(masked)):
                chances = np.array([share[token] for share, token in zip(shares, drawn, strict=True)])
                if chances.prod() == 0:
                    continue
                powers = chances ** (1 / temperature) if len(masked) > 1 else np.ones(1)
                for index, kept in enumerate(powers / powers.sum()):
                    after = list(state)
                    after[masked[index]] = drawn[index]
                    key = tuple(after)
                    following[key] = following.get(key, 0.0) + weight * chances.prod() * kept
        law = following
    return np.array([law.get(tuple(row), 0.0) for row in sequences().tolist()])


def test_confidence_sampling_follows_its_exact_law():
    joint, rows = joint_distribution(), 6000
    result = sample(
        ExactCodes(joint),
        Vocabulary(size=5, mask_id=3, bos_id=4, eos_id=4, pad_id=None),
        EXACT_LENGTH,
        replace(CONFIDENCE, steps=3, choice_temperature=0.5),
        known_BL=np.tile([4, -1, -1, -1], (rows, 1)),
        labels_B=np.zeros(rows, np.int64),
        seed=11,
        batch_sequences=rows,
        device="cpu",
    )
    assert result.forward_passes == 3
    counts = np.bincount(result.tokens_BL[:, 1:] @ [9, 3, 1], minlength=27)
    assert p_value(counts, confidence_law(joint, 0.5)) > 1e-4
    # The test has power: sure codes first is not the joint, nor is another choice temperature.
    assert p_value(counts, joint.ravel()) < 1e-6
    assert p_value(counts, confidence_law(joint, 5.0)) < 1e-6
