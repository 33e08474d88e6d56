from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.models.vocabulary import VocabularyLinear
from pgm_scale.sampling import sample
from pgm_scale.sampling.categorical import TokenDraw, TokenRules
from pgm_scale.sampling.guidance import GuidedRows, guidance_weights
from tests.sampling.image_models import (
    BOS,
    CLASSES,
    CODES,
    LENGTH,
    MASK,
    VOCABULARY,
    generate,
    image_model,
    known_images,
)

VOCAB = 1000


def test_the_linear_ramp_starts_at_0_and_ends_at_w():
    config = SamplerConfig(guidance=3.0)
    ramp = [float(guidance_weights(config, step, np.array([5]))[0]) for step in range(5)]
    assert ramp == [0.0, 0.75, 1.5, 2.25, 3.0]
    assert guidance_weights(config, 0, np.array([1, 2, 5])).tolist() == [3.0, 0.0, 0.0]
    constant = SamplerConfig(guidance=3.0, guidance_schedule="constant")
    assert guidance_weights(constant, 0, np.array([1, 5])).tolist() == [3.0, 3.0]


def test_a_guided_draw_equals_the_combination_of_logits_in_float64():
    """4 images, one of which has no class and one the weight 0; 3 targets each, somewhere in 6 codes."""
    torch.manual_seed(3)
    linear, hidden_RLH = VocabularyLinear(16, VOCAB), torch.randn(6, 6, 16)
    labels_B, weights_B = np.array([2, CLASSES, 0, 1]), np.array([1.5, 4.0, 0.0, 3.0])
    rows = GuidedRows.of(labels_B, weights_B, CLASSES)
    assert rows.rows_R.tolist() == [0, 1, 2, 3, 0, 3]
    assert rows.classes_R.tolist() == [2, CLASSES, 0, 1, CLASSES, CLASSES]

    target_BL = np.array(
        [[0, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]], bool
    )
    rows_Q, columns_Q = np.nonzero(target_BL)
    uniforms_Q = torch.rand(12, dtype=torch.float64)
    draw = TokenDraw(TokenRules((MASK, BOS)), uniforms_Q)
    readout = rows.readout(draw, rows_Q, np.flatnonzero(target_BL[rows.rows_R]))
    with torch.inference_mode():
        drawn_Q = readout(hidden_RLH, linear)
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    logits_RLV = hidden_RLH.double() @ weight.T + bias
    second_half = {0: 4, 3: 5}
    for row, column, uniform, drawn in zip(rows_Q, columns_Q, uniforms_Q, drawn_Q, strict=True):
        logits_V = logits_RLV[row, column]
        if row in second_half:
            w = float(weights_B[row])
            logits_V = (1 + w) * logits_V - w * logits_RLV[second_half[row], column]
        logits_V[[MASK, BOS]] = -torch.inf
        cumulative_V = logits_V.softmax(dim=0).cumsum(dim=0)
        assert int(drawn) == int(torch.searchsorted(cumulative_V, float(uniform), right=True))


def test_nothing_guided_keeps_the_draw_itself():
    rows = GuidedRows.of(np.array([0, 1]), np.zeros(2), CLASSES)
    assert rows.rows_R.tolist() == [0, 1]
    readout = rows.readout(TokenDraw(TokenRules((MASK,)), torch.zeros(2)), np.array([0, 1]), np.array([4, 9]))
    assert isinstance(readout, TokenDraw)
    assert readout.rows_Q is not None
    assert readout.rows_Q.tolist() == [4, 9]


HALTON: dict[str, Any] = {"kind": "halton", "steps": 2}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("pgm", {"kind": "pgm_uniform", "guidance": 1.0}, "sampler.guidance needs"),
        ("pgm", {"kind": "pgm_uniform", "temperature_warmup_steps": 1}, "temperature_warmup_steps needs"),
        ("maskgit", {"kind": "pgm_uniform"}, "choose one of halton, confidence"),
        ("maskgit", HALTON | {"quirks": ("register_offset",)}, "one of a partition_transformer"),
        ("maskgit", {"kind": "confidence", "quirks": ("resampled_tokens",)}, "with sampler.kind halton"),
        ("pgm", HALTON | {"quirks": ("dropout",)}, "with sampler.kind confidence"),
        ("pgm", HALTON | {"quirks": ("resampled_tokens",)}, "one of a maskgit_transformer"),
    ],
)
def test_settings_that_do_not_fit_are_one_message(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        generate(image_model(name), known_images([CODES]), [0], SamplerConfig(**config))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("labels_B", "message"),
    [
        (None, "needs the class of each row"),
        (np.array([0]), "one whole number for each of 2 rows"),
        (np.array([0.0, 1.0]), "float64"),
        (np.array([0, CLASSES + 1]), "classes 0 to 2, and 3 stands for none"),
        (np.array([-1, 0]), "reach from -1"),
    ],
)
def test_labels_that_do_not_fit_are_one_message(labels_B, message):
    arguments: dict[str, Any] = {"seed": 1, "batch_sequences": 2, "device": "cpu"}
    model, known_BL, config = image_model("pgm"), known_images([CODES] * 2), SamplerConfig(**HALTON)
    with pytest.raises(UserError, match=message):
        sample(model, VOCABULARY, LENGTH, config, known_BL=known_BL, labels_B=labels_B, **arguments)
    with pytest.raises(UserError, match="start with BOS"):
        generate(model, np.full((1, LENGTH), -1), [0], config)
