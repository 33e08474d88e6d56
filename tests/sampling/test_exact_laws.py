"""Every sampler draws from the law it claims: chi-square against enumeration, with models that are exact."""

from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.sampling import SampleResult, sample
from tests.sampling.chi_square import p_value
from tests.sampling.exact import (
    BOS,
    LENGTH,
    MASK,
    VOCABULARY,
    ExactDiffusion,
    ExactPartition,
    ancestral_law,
    joint_distribution,
    sequences,
)

JOINT = joint_distribution()
ROWS = 6000


def draw(kind: Any, steps: int, known: list[int]) -> SampleResult:
    model = (ExactPartition if kind.startswith("pgm") else ExactDiffusion)(JOINT)
    return sample(
        model,
        VOCABULARY,
        LENGTH,
        SamplerConfig(kind=kind, steps=steps),
        known_BL=np.tile(known, (ROWS, 1)),
        seed=11,
        batch_sequences=ROWS,
        device="cpu",
    )


def law_p_value(tokens_BL: np.ndarray, law: np.ndarray) -> float:
    return p_value(np.bincount(tokens_BL[:, 1:] @ [9, 3, 1], minlength=27), law)


def test_uniform_with_one_token_a_step_draws_from_the_joint():
    result = draw("pgm_uniform", 3, [BOS, -1, -1, -1])
    assert result.forward_passes == 3
    assert law_p_value(result.tokens_BL, JOINT.ravel()) > 1e-4


def test_uniform_infills_from_the_conditional_and_keeps_what_is_known():
    result = draw("pgm_uniform", 2, [BOS, -1, 2, -1])
    assert (result.tokens_BL[:, 2] == 2).all()
    conditional = JOINT * (np.arange(3) == 2)[None, :, None]
    assert law_p_value(result.tokens_BL, conditional.ravel() / conditional.sum()) > 1e-4


MASKED_SAMPLERS = ["pgm_non_uniform", "pgm_naive", "ancestral", "ancestral_cached", "analytic"]


@pytest.mark.parametrize("kind", MASKED_SAMPLERS)
def test_masked_samplers_follow_the_ancestral_law_of_few_steps(kind):
    result = draw(kind, 4, [BOS, -1, -1, -1])
    law = ancestral_law(JOINT, (BOS, MASK, MASK, MASK), steps=4)
    assert law_p_value(result.tokens_BL, law) > 1e-4
    # The test has power: four steps are far from the joint, and these samples show it.
    assert law_p_value(result.tokens_BL, JOINT.ravel()) < 1e-6


@pytest.mark.parametrize("kind", ["pgm_non_uniform", "ancestral_cached"])
def test_masked_samplers_reach_the_joint_with_many_steps(kind):
    result = draw(kind, 2000, [BOS, -1, -1, -1])
    assert law_p_value(result.tokens_BL, JOINT.ravel()) > 1e-4


@pytest.mark.parametrize("kind", MASKED_SAMPLERS)
def test_masked_samplers_infill(kind):
    result = draw(kind, 4, [BOS, -1, 2, -1])
    assert (result.tokens_BL[:, 2] == 2).all()
    assert law_p_value(result.tokens_BL, ancestral_law(JOINT, (BOS, MASK, 2, MASK), steps=4)) > 1e-4


def test_conditionals_of_the_stub_are_those_of_the_joint():
    table = ExactPartition(JOINT).table.exp()
    state = (np.array([BOS, 1, MASK, 2]) * 4 ** np.arange(4)).sum()
    expected = JOINT[1, :, 2] / JOINT[1, :, 2].sum()
    torch.testing.assert_close(table[state, 2, :3].double(), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
    assert len(sequences()) == 27
