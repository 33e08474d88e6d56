"""The samplers with real, tiny, random models."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    ModelConfig,
    PartitionTransformerConfig,
    SamplerConfig,
)
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.errors import UserError
from pgm_scale.models import build_model
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.segments import Segments
from pgm_scale.sampling import (
    IMAGE_KINDS,
    SAMPLERS,
    SampleResult,
    SamplingBatch,
    fitting_sampler,
    known_prefixes,
    sample,
)
from pgm_scale.sampling.ancestral import opening_steps, time_grid
from pgm_scale.sampling.pgm_uniform import equal_steps
from tests.sampling.chi_square import p_value

LENGTH, SIZE, MASK, BOS = 13, 11, 10, 0
VOCABULARY = Vocabulary(size=SIZE, mask_id=MASK, bos_id=BOS, eos_id=BOS, pad_id=None)
KINDS = [kind for kind in SAMPLERS if kind not in IMAGE_KINDS]
PGM_KINDS = [kind for kind in KINDS if kind.startswith("pgm")]


def random_model(config: ModelConfig, length: int = LENGTH, size: int = SIZE) -> nn.Module:
    """Every parameter random: the published initial values make all logits 0."""
    torch.manual_seed(5)
    model = build_model(config, size, length)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def model_for(kind: str, dropout: float = 0.0) -> nn.Module:
    config: ModelConfig
    if kind.startswith("pgm"):
        config = PartitionTransformerConfig(
            hidden_size=16,
            num_heads=2,
            num_encoder_blocks=2,
            num_decoder_blocks=2,
            condition_size=8,
            dropout=dropout,
        )
    elif kind == "autoregressive":
        config = AutoregressiveTransformerConfig(hidden_size=16, num_heads=2, num_blocks=2, dropout=dropout)
    else:
        config = DiffusionTransformerConfig(
            hidden_size=16,
            num_heads=2,
            num_blocks=2,
            condition_size=8,
            dropout=dropout,
            time_conditioned=True,
        )
    return random_model(config)


def run(kind: Any, known_BL: np.ndarray, model: nn.Module | None = None, **changes: Any) -> SampleResult:
    arguments: dict[str, Any] = {"seed": 1, "batch_sequences": 64, "device": "cpu"} | changes
    config = arguments.pop("config", SamplerConfig(kind=kind, steps=5))
    model = model_for(kind) if model is None else model
    return sample(model, VOCABULARY, LENGTH, config, known_BL=known_BL, **arguments)


def ragged_known(kind: str, rows: int = 7) -> np.ndarray:
    """Rows that know 1 to 13 tokens, anywhere (for AR: a prefix); the last one knows all."""
    generator = np.random.default_rng(0)
    known_BL = generator.integers(0, MASK, size=(rows, LENGTH))
    for row, known_L in enumerate(known_BL[:-1]):
        hidden = np.arange(1 + 2 * row, LENGTH) if kind == "autoregressive" else 1 + generator.permutation(12)
        known_L[hidden[: LENGTH - 1 - 2 * row]] = -1
    known_BL[:, 0] = BOS
    return known_BL


@pytest.mark.parametrize("kind", KINDS)
def test_known_tokens_stay_and_all_others_are_real_tokens(kind):
    known_BL = ragged_known(kind)
    tokens_BL = run(kind, known_BL).tokens_BL
    np.testing.assert_array_equal(tokens_BL[known_BL >= 0], known_BL[known_BL >= 0])
    assert ((tokens_BL >= 0) & (tokens_BL < MASK)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_text_at_any_batch_split(kind):
    known_BL = ragged_known(kind)
    whole = run(kind, known_BL).tokens_BL
    for batch_sequences in (1, 3):
        split = run(kind, known_BL, batch_sequences=batch_sequences).tokens_BL
        np.testing.assert_array_equal(split, whole)
    tail = run(kind, known_BL[2:], first_sample_number=2).tokens_BL
    np.testing.assert_array_equal(tail, whole[2:])
    assert (run(kind, known_BL, seed=2).tokens_BL != whole).any()
    assert (run(kind, known_BL[2:]).tokens_BL != whole[2:]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_and_the_training_flags_come_back(kind):
    known_BL = ragged_known(kind)
    model = model_for(kind, dropout=0.5).train()
    frozen: Any = model
    frozen.output_layer.eval()
    tokens_BL = run(kind, known_BL, model).tokens_BL
    np.testing.assert_array_equal(tokens_BL, run(kind, known_BL).tokens_BL)
    assert model.training
    assert not frozen.output_layer.training


def full_length_logits(model: nn.Module, tokens_L: np.ndarray, masked_L: np.ndarray) -> np.ndarray:
    """[L, V] by the training layout: group 1 is what is masked, and every position is predicted."""
    clean, masked = np.flatnonzero(~masked_L), np.flatnonzero(masked_L)
    keys, queries = np.concatenate([clean, masked]), np.concatenate([masked, clean])
    inputs = PartitionInputs(
        tokens_T=torch.from_numpy(tokens_L[keys]),
        positions_T=torch.from_numpy(keys),
        segments=Segments.of([len(clean), len(masked)], "cpu"),
        query_positions_Q=torch.from_numpy(queries),
        query_segments=Segments.of([len(masked), len(clean)], "cpu"),
    )
    logits_LV = np.empty((len(keys), SIZE), np.float64)
    with torch.inference_mode():
        logits_LV[queries] = model(inputs).numpy()
    return logits_LV


@pytest.mark.parametrize("steps", [1, 4, 5, 12, 40])
def test_uniform_sampling_equals_a_slow_oracle_token_by_token(steps):
    """One row at a time, full length with a group mask, all logits, the law written out."""
    model = model_for("pgm_uniform").eval()
    known_BL = ragged_known("pgm_uniform")
    config = SamplerConfig(steps=steps)
    result = run("pgm_uniform", known_BL, model, config=config)
    batch = SamplingBatch(known_BL, np.arange(len(known_BL)), 1, VOCABULARY, config, torch.device("cpu"))
    order_uniforms_BL, token_uniforms_BL = batch.uniforms_BL("order"), batch.uniforms_BL("token")
    for row, known_L in enumerate(known_BL):
        tokens_L, masked_L = np.where(known_L < 0, MASK, known_L), known_L < 0
        unknown = np.flatnonzero(masked_L)
        order = unknown[np.argsort(order_uniforms_BL[row, unknown])]
        row_steps = max(1, min(steps, len(order)))
        bounds = [-(-number * len(order) // row_steps) for number in range(row_steps + 1)]
        for start, end in itertools.pairwise(bounds):
            logits_LV = full_length_logits(model, tokens_L, masked_L)
            for position in order[start:end]:
                real_V = np.exp(logits_LV[position, :MASK])
                cumulative_V = np.cumsum(real_V / real_V.sum())
                tokens_L[position] = np.searchsorted(cumulative_V, token_uniforms_BL[row, position], "right")
            masked_L[order[start:end]] = False
        np.testing.assert_array_equal(result.tokens_BL[row], tokens_L)


def test_non_uniform_packed_sampling_equals_naive():
    model, known_BL = model_for("pgm_naive"), ragged_known("pgm_naive")
    for steps in (1, 6, 50):
        packed, naive = (
            run(kind, known_BL, model, config=SamplerConfig(steps=steps, kind=kind))
            for kind in ("pgm_non_uniform", "pgm_naive")
        )
        np.testing.assert_array_equal(packed.tokens_BL, naive.tokens_BL)


def test_the_ancestral_cache_changes_only_the_cost():
    model, known_BL = model_for("ancestral"), ragged_known("ancestral")
    for steps in (1, 6, 200):
        plain = run("", known_BL, model, config=SamplerConfig(kind="ancestral", steps=steps))
        cached = run("", known_BL, model, config=SamplerConfig(kind="ancestral_cached", steps=steps))
        np.testing.assert_array_equal(plain.tokens_BL, cached.tokens_BL)
        assert plain.forward_passes == steps
        assert cached.forward_passes <= min(steps, int((known_BL < 0).sum()))


def plan_batch(rows: int, length: int, steps: int, known: int = 1) -> SamplingBatch:
    known_BL = np.full((rows, length), -1)
    known_BL[:, :known] = BOS
    config = SamplerConfig(steps=steps)
    return SamplingBatch(known_BL, np.arange(rows), 3, VOCABULARY, config, torch.device("cpu"))


@pytest.mark.parametrize("steps", [1, 2, 7, 12, 100])
def test_equal_steps_differ_by_at_most_one_token_and_none_is_empty(steps):
    step_BL = equal_steps(plan_batch(5, 13, steps))
    assert (step_BL[:, 0] == -1).all()
    for step_L in step_BL[:, 1:]:
        counts = np.bincount(step_L, minlength=min(steps, 12))
        assert len(counts) == min(steps, 12)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1
    result = run("", known_prefixes([[]], LENGTH, BOS), model_for("pgm"), config=SamplerConfig(steps=steps))
    assert result.forward_passes == min(steps, 12)


def test_equal_steps_visit_positions_in_uniformly_random_order():
    step_BL = equal_steps(plan_batch(6000, 4, steps=3))
    orders = step_BL[:, 1:] @ [9, 3, 1]
    counts = np.unique(orders, return_counts=True)[1]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-4


def test_opening_counts_are_binomial_over_what_remains():
    """The count of a step given what remains, for each step of few, against its exact binomial law."""
    steps, free = 4, 6
    step_BL = opening_steps(plan_batch(8000, free + 1, steps))[:, 1:]
    times = time_grid(steps)
    for number in range(steps):
        remaining_B, opened_B = (step_BL >= number).sum(axis=1), (step_BL == number).sum(axis=1)
        share = 1 - times[number + 1] / times[number]  # (alpha_s - alpha_t) / (1 - alpha_t), log-linear
        for remaining in range(1, free + 1):
            counts = np.bincount(opened_B[remaining_B == remaining], minlength=remaining + 1)
            if counts.sum() >= 100:
                assert p_value(counts, stats.binom.pmf(np.arange(remaining + 1), remaining, share)) > 1e-4


def test_what_the_grid_leaves_is_decoded_at_the_end():
    """A third of the uniforms lie beyond the grid's last step, so their tokens need the extra pass."""
    batch = plan_batch(1, LENGTH, 5)
    uniforms_BL = np.where(np.arange(LENGTH) % 3 == 1, 1 - 1e-6, batch.uniforms_BL("order"))[:1]

    class Late(SamplingBatch):
        def uniforms_BL(self, purpose: str) -> np.ndarray:
            return uniforms_BL if purpose == "order" else super().uniforms_BL(purpose)

    late = Late(batch.known_BL, batch.sample_numbers_B, 3, VOCABULARY, batch.config, batch.device)
    for kind in ("pgm_non_uniform", "ancestral", "ancestral_cached"):
        with torch.inference_mode():
            tokens_BL, passes = SAMPLERS[kind][1](model_for(kind).eval(), late)
        assert (opening_steps(late)[0] == 5).sum() == 4
        assert (tokens_BL < MASK).all()
        assert passes <= 6


def test_autoregressive_sampling_follows_its_full_forward_pass():
    """Two free tokens: chi-square against the joint that an uncached forward pass gives."""
    model: Any = model_for("autoregressive").eval()
    rows = 6000
    known_BL = np.full((rows, LENGTH), -1)
    known_BL[:, : LENGTH - 2] = np.random.default_rng(1).integers(0, MASK, LENGTH - 2)
    known_BL[:, 0] = BOS
    result = run("autoregressive", known_BL, model, batch_sequences=rows)
    assert result.forward_passes == 2
    every = np.repeat(known_BL[:1], MASK * MASK, axis=0)
    every[:, -2], every[:, -1] = np.divmod(np.arange(MASK * MASK), MASK)
    with torch.inference_mode():
        scores = model(torch.from_numpy(every)).double()[..., :MASK].log_softmax(-1).numpy()
    number = np.arange(len(every))
    law = np.exp(scores[number, -3, every[:, -2]] + scores[number, -2, every[:, -1]])
    counts = np.bincount(result.tokens_BL[:, -2] * MASK + result.tokens_BL[:, -1], minlength=len(every))
    assert p_value(counts, law) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_does_not_depend_on_the_token_draws(kind):
    """top_k = 1 leaves one token; only the order, which the seed decides, may change it."""
    known_BL = known_prefixes([[3, 4]] * 2, LENGTH, BOS)
    greedy = run(kind, known_BL, config=SamplerConfig(kind=kind, steps=1, top_k=1)).tokens_BL
    if kind != "analytic":
        np.testing.assert_array_equal(greedy[0], greedy[1])
    free = run(kind, known_BL, config=SamplerConfig(kind=kind, steps=1)).tokens_BL
    assert (free[0] != free[1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_not_finite_are_an_error(kind):
    model: Any = model_for(kind)
    with torch.no_grad():
        model.output_layer.linear.weight[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        run(kind, known_prefixes([[]], LENGTH, BOS), model)


@pytest.mark.parametrize("kind", PGM_KINDS)
def test_pgm_needs_no_known_token(kind):
    tokens_BL = run(kind, np.full((2, LENGTH), -1)).tokens_BL
    assert ((tokens_BL >= 0) & (tokens_BL < MASK)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_models_can_be_sampled(kind):
    known_BL = known_prefixes([[3], []], LENGTH, BOS)
    for model in (model_for(kind), model_for(kind).to(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            tokens_BL = run(kind, known_BL, model).tokens_BL
        assert ((tokens_BL >= 0) & (tokens_BL < MASK)).all()


def test_the_settings_move_to_a_sampler_that_fits_the_model():
    config = SamplerConfig(kind="pgm_non_uniform", steps=7, top_p=0.5)
    assert fitting_sampler(config, model_for("pgm")) == config
    for kind in ("ancestral_cached", "autoregressive"):
        assert fitting_sampler(config, model_for(kind)) == replace(config, kind=kind)


def test_result_counts_generated_tokens():
    known_BL = known_prefixes([[], [1, 2]], LENGTH, BOS)
    result = run("pgm_uniform", known_BL)
    assert result.tokens_per_second == pytest.approx(((LENGTH - 1) + (LENGTH - 3)) / result.elapsed_s)
    assert run("pgm_uniform", known_BL, batch_sequences=1).forward_passes == 2 * result.forward_passes


def test_misuse_is_one_message():
    pgm, known_BL = model_for("pgm_uniform"), known_prefixes([[]], LENGTH, BOS)
    with pytest.raises(UserError, match="choose one of pgm_uniform"):
        run("ancestral", known_BL, pgm)
    with pytest.raises(UserError, match="shape"):
        run("pgm_uniform", known_BL[:, :-1], pgm)
    with pytest.raises(UserError, match="ids 0 to 10"):
        run("pgm_uniform", np.where(known_BL == BOS, SIZE, known_BL), pgm)
    with pytest.raises(UserError, match="mask id"):
        run("pgm_uniform", np.where(known_BL == BOS, MASK, known_BL), pgm)
    with pytest.raises(UserError, match="batch size"):
        run("pgm_uniform", known_BL, pgm, batch_sequences=0)
    with pytest.raises(UserError, match="steps"):
        run("pgm_uniform", known_BL, pgm, config=SamplerConfig(steps=0))
    with pytest.raises(UserError, match="model has 11"):
        sample(
            pgm,
            Vocabulary(12, 11, 0, 0, None),
            LENGTH,
            SamplerConfig(),
            known_BL=known_BL,
            seed=0,
            batch_sequences=1,
            device="cpu",
        )
    with pytest.raises(UserError, match="length 14"):
        sample(
            pgm,
            VOCABULARY,
            14,
            SamplerConfig(),
            known_BL=known_BL,
            seed=0,
            batch_sequences=1,
            device="cpu",
        )
    with pytest.raises(UserError, match="shorten"):
        known_prefixes([[1] * (LENGTH - 1)], LENGTH, BOS)


def test_autoregressive_refuses_what_it_cannot_do():
    known_BL = known_prefixes([[], []], LENGTH, BOS)
    known_BL[1, 5] = 2
    with pytest.raises(UserError, match="infill"):
        run("autoregressive", known_BL)
    with pytest.raises(UserError, match="BOS at position 0"):
        run("autoregressive", np.full((1, LENGTH), -1))
