from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.categorical import TokenDraw
from pgm_scale.sampling.codes import CodeReader
from pgm_scale.sampling.decode import DecodingStep, decode
from pgm_scale.sampling.halton import halton_cells, halton_ranks, halton_steps
from pgm_scale.sampling.pgm_naive import predict_by_groups
from tests.sampling.image_models import (
    BOS,
    CLASSES,
    CODEBOOK,
    CODES,
    LENGTH,
    MASK,
    MODELS,
    SIDE,
    VOCABULARY,
    assert_any_batch_split_gives_the_same,
    batch_of,
    code_logits,
    generate,
    guided_probabilities,
    image_model,
    known_images,
    ramp,
    shown,
    token_at,
)

HALTON = SamplerConfig(kind="halton", steps=6)


def radical_inverse(number: int, base: int) -> float:
    value, place = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        place /= base
        value += digit * place
    return value


def first_visits(side: int, points: int) -> list[int]:
    """The reference's way: floats, and a fixed number of points."""
    cells = [
        int(radical_inverse(i, 2) * side) * side + int(radical_inverse(i, 3) * side)
        for i in range(1, points + 1)
    ]
    return list(dict.fromkeys(cells))


@pytest.mark.parametrize(("side", "last_point"), [(32, 2292), (16, 685), (24, 2201)])
def test_the_order_is_the_published_one_and_covers_the_grid_at_the_published_point(side, last_point):
    cells = halton_cells(side).tolist()
    assert cells == first_visits(side, last_point)
    assert sorted(cells) == list(range(side * side))
    assert len(first_visits(side, last_point - 1)) == side * side - 1


def test_the_first_cells_of_a_grid_of_32():
    rows_and_columns = [divmod(cell, 32) for cell in halton_cells(32)[:8].tolist()]
    assert rows_and_columns == [(16, 10), (8, 21), (24, 3), (4, 14), (20, 24), (12, 7), (28, 17), (2, 28)]
    ranks_L = halton_ranks(1025)
    assert ranks_L[0] == 0
    assert ranks_L[1 + 16 * 32 + 10] == 1
    assert ranks_L[1 + 2 * 32 + 28] == 8


@pytest.mark.parametrize("side", [1, 2, 3, 5, 27])
def test_other_grids_are_covered_too(side):
    assert sorted(halton_cells(side).tolist()) == list(range(side * side))


PUBLISHED = {
    8: "81 83 86 91 99 112 142 330",
    32: "20 20 21 20 21 20 21 21 21 22 21 22 22 23 23 23 24 24 25 26 26 28 28 30 32 34 36 40 45 53 68 164",
}


@pytest.mark.parametrize("steps", PUBLISHED)
def test_the_published_numbers_of_codes_a_step(steps):
    known_BL = np.full((1, 1025), -1)
    known_BL[:, 0] = 3
    config = replace(HALTON, steps=steps)
    batch = SamplingBatch(known_BL, np.zeros(1, np.int64), 1, VOCABULARY, config, torch.device("cpu"))
    step_BL = halton_steps(batch)
    assert " ".join(map(str, np.bincount(step_BL[0, 1:]))) == PUBLISHED[steps]
    first = np.flatnonzero(step_BL[0] == 0)
    assert first.tolist() == sorted((1 + halton_cells(32)[: len(first)]).tolist())


def oracle(model: Any, batch: SamplingBatch, row: int) -> np.ndarray:
    """One image: the positions in order, the logits of both halves by full passes, the law written out."""
    config, label = batch.config, int(batch.labels_B[row])  # type: ignore[index]
    masked_L = batch.known_BL[row] < 0
    tokens_L = np.where(masked_L, MASK, batch.known_BL[row])
    uniforms_L = batch.uniforms_BL("token")[row]
    order = [1 + cell for cell in first_visits(SIDE, 200) if masked_L[1 + cell]]
    steps, start = min(config.steps, len(order)), 0
    for number in range(steps):
        end = max(number + 1, shown(len(order), (number + 1) / steps))
        temperature = config.temperature * (2 if number < config.temperature_warmup_steps else 1)
        weight = ramp(config, number, steps)
        shares_LV = guided_probabilities(model, tokens_L, masked_L, label, weight, temperature)
        for position in order[start:end]:
            tokens_L[position] = token_at(shares_LV[position], uniforms_L[position])
        masked_L[order[start:end]] = False
        start = end
    return tokens_L


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes",
    [
        {"guidance": 0.0},
        {"guidance": 2.0, "temperature_warmup_steps": 2, "temperature": 0.8},
        {"guidance": 1.5, "guidance_schedule": "constant", "steps": 3},
        {"guidance": 3.0, "steps": 1},
        {"guidance": 3.0, "steps": 40},
    ],
)
def test_guided_halton_sampling_equals_a_slow_oracle_token_by_token(name, changes):
    model, config = image_model(name), replace(HALTON, **changes)
    known_BL, labels = known_images([CODES, CODES, 9, 1, 0, 9, CODES]), [0, 2, 1, 0, 2, CLASSES, CLASSES]
    tokens_BL = generate(model, known_BL, labels, config).tokens_BL
    batch = batch_of(known_BL, labels, config)
    for row, tokens_L in enumerate(tokens_BL):
        np.testing.assert_array_equal(tokens_L, oracle(model, batch, row))


class Tap:
    """A model that also keeps the logits of its last call."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.logits_QV = torch.empty(0)

    def __call__(self, inputs: Any, readout: Any) -> Any:
        self.logits_QV = self.model(inputs)
        return self.model(inputs, readout=readout)


def test_packed_logits_equal_those_of_the_group_mask_at_every_step():
    tap, known_BL, labels = Tap(image_model("pgm")), known_images([CODES, CODES]), [0, CLASSES]
    batch = batch_of(known_BL, labels, HALTON)
    step_BL = halton_steps(batch)
    ranks_BL = np.tile(halton_ranks(LENGTH), (2, 1))
    reader = CodeReader(TokenDraw, step_BL.max(axis=1) + 1, ranks_BL)
    steps = []

    def compare(model: Any, batch: SamplingBatch, step: DecodingStep) -> torch.Tensor:
        drawn_Q = reader(tap, batch, step)
        oracle_QV = [
            code_logits(tap.model, step.tokens_BL[row].numpy(), step.masked_BL[row], label)[
                step.target_BL[row]
            ]
            for row, label in enumerate(labels)
        ]
        np.testing.assert_allclose(
            tap.logits_QV[:, :CODEBOOK], np.concatenate(oracle_QV), atol=1e-4, rtol=1e-4
        )
        steps.append(step.number)
        return drawn_Q

    with torch.inference_mode():
        packed_BL, _ = decode(tap, compare, batch, step_BL)
        naive_BL, _ = decode(tap.model, predict_by_groups, batch, step_BL)
    assert steps == list(range(HALTON.steps))
    assert torch.equal(packed_BL, naive_BL)


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_the_same_grids_at_any_batch_split(name):
    assert_any_batch_split_gives_the_same(image_model(name), replace(HALTON, guidance=1.0))


@pytest.mark.parametrize("name", MODELS)
def test_known_codes_stay_and_drawn_ones_are_codes(name):
    known_BL = known_images([CODES, 9, 0, 1])
    tokens_BL = generate(image_model(name), known_BL, [0, 1, 2, CLASSES], HALTON).tokens_BL
    np.testing.assert_array_equal(tokens_BL[known_BL >= 0], known_BL[known_BL >= 0])
    assert (tokens_BL[:, 0] == BOS).all()
    assert tokens_BL[:, 1:].max() < CODEBOOK
    assert tokens_BL.min() >= 0


def test_without_guidance_or_without_class_a_pass_holds_each_image_once():
    """And a step of weight 0, as the linear ramp's first, does not pay for guidance either."""
    model, rows = image_model("maskgit"), []
    model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    known_BL = known_images([CODES] * 4)

    def rows_of(labels: list[int], **changes: Any) -> list[int]:
        rows.clear()
        generate(model, known_BL, labels, replace(HALTON, steps=3, **changes))
        return list(rows)

    assert rows_of([0, 1, 2, 0]) == [4, 4, 4]
    assert rows_of([CLASSES] * 4, guidance=1.0) == [4, 4, 4]
    assert rows_of([0, CLASSES, 2, 0], guidance=1.0) == [4, 7, 7]
    assert rows_of([0, 1, 2, 0], guidance=1.0, guidance_schedule="constant") == [8, 8, 8]


def test_resampling_draws_earlier_codes_again_and_nothing_else():
    """The quirk written out: each step draws all of the first r_k positions, seeing what they were."""
    model, known_BL, labels = image_model("maskgit"), known_images([CODES, 6]), [1, 2]
    config = replace(HALTON, steps=4, quirks=("resampled_tokens",))
    tokens_BL = generate(model, known_BL, labels, config).tokens_BL
    batch = batch_of(known_BL, labels, config)
    for row, tokens_L in enumerate(tokens_BL):
        masked_L = known_BL[row] < 0
        expected_L = np.where(masked_L, MASK, known_BL[row])
        order = [1 + cell for cell in first_visits(SIDE, 200) if masked_L[1 + cell]]
        for number in range(4):
            end = max(number + 1, shown(len(order), (number + 1) / 4))
            shares_LV = guided_probabilities(model, expected_L, masked_L, labels[row], 0.0, 1.0)
            uniforms_L = batch.uniforms_BL(f"token.step{number}")[row]
            for position in order[:end]:
                expected_L[position] = token_at(shares_LV[position], uniforms_L[position])
        np.testing.assert_array_equal(tokens_L, expected_L)
    right = generate(model, known_BL, labels, replace(config, quirks=())).tokens_BL
    assert (tokens_BL != right).any()


def test_the_register_offset_hides_the_code_that_was_decoded_last():
    """The published fault (FACTS 8.14), one image and one code a step: BOS is hidden at the first step."""
    model, known_BL = image_model("pgm"), known_images([CODES])
    config = replace(HALTON, steps=3, quirks=("register_offset",))
    tokens_BL = generate(model, known_BL, [1], config).tokens_BL
    uniforms_L = batch_of(known_BL, [1], config).uniforms_BL("token")[0]
    expected_L = np.where(known_BL[0] < 0, MASK, known_BL[0])
    order = [1 + cell for cell in first_visits(SIDE, 200)]
    bounds = [0, *(shown(CODES, k / 3) for k in (1, 2, 3))]
    for start, end in itertools.pairwise(bounds):
        hidden_L = np.ones(LENGTH, bool)
        hidden_L[[0, *order[:start]][:-1]] = False
        shares_LV = guided_probabilities(model, expected_L, hidden_L, 1, 0.0, 1.0)
        for position in order[start:end]:
            expected_L[position] = token_at(shares_LV[position], uniforms_L[position])
    np.testing.assert_array_equal(tokens_BL[0], expected_L)
    assert (tokens_BL != generate(model, known_BL, [1], replace(config, quirks=())).tokens_BL).any()


def test_rows_that_are_no_square_grid_are_refused():
    with pytest.raises(UserError, match="square"):
        halton_ranks(17 + 1)
