"""Continuous batching draws for each row what it would get alone from `sample`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import PartitionTransformerConfig, SamplerConfig
from pgm_scale.models import build_model
from pgm_scale.models.int8 import quantize_blocks
from pgm_scale.sampling import known_prefixes, sample
from pgm_scale.sampling import stepwise as stepwise_module
from pgm_scale.sampling.categorical import TokenDraw, TokenRules
from pgm_scale.sampling.stepwise import Row, RowwiseDraw, StepwiseDecoding
from tests.sampling.test_samplers import BOS, LENGTH, MASK, SIZE, VOCABULARY, model_for, random_model

QUERIES = ("learn", "learn+freqs", "learn+freqs+mean")


def model_of(query: str = "learn+freqs", decoder_blocks: int = 2) -> Any:
    config = PartitionTransformerConfig(
        hidden_size=16,
        num_heads=2,
        num_encoder_blocks=2,
        num_decoder_blocks=decoder_blocks,
        condition_size=8,
        dropout=0.0,
        group_swap_query=query,  # type: ignore[arg-type]
    )
    return random_model(config).eval()


def rows_of_all_kinds() -> list[Row]:
    """Other prompts, lengths, steps, seeds, rules and plans, holes anywhere."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(12):
        length = int(generator.integers(2, LENGTH + 1))
        known_L = np.where(generator.random(length) < 0.4, generator.integers(1, MASK, length), -1)
        known_L[0], known_L[-1] = BOS, -1
        config = SamplerConfig(
            kind="pgm_non_uniform" if number % 3 == 0 else "pgm_uniform",
            steps=int(generator.integers(1, 9)),
            temperature=float(generator.choice([1.0, 0.5, 2.0])),
            top_p=float(generator.choice([1.0, 0.8])),
            top_k=int(generator.choice([0, 3])),
        )
        rows.append(Row(known_L, seed=number % 4, sample_number=number % 5, config=config))
    return rows


def alone(model: Any, row: Row) -> np.ndarray:
    """By `sample`, as the only row of a batch of its own length."""
    return sample(
        model,
        VOCABULARY,
        len(row.known_L),
        row.config,
        known_BL=row.known_L[None],
        seed=row.seed,
        batch_sequences=1,
        first_sample_number=row.sample_number,
        device="cpu",
    ).tokens_BL[0]


def decode_all(model: Any, rows: list[Row], max_rows: int, joining: int) -> list[np.ndarray]:
    """`joining` of them join before each step, while there are slots."""
    decoding = StepwiseDecoding(model, VOCABULARY, max_rows, "cpu")
    tokens = {row: row.known_L.copy() for row in rows}
    finished = set()
    waiting = list(rows)
    while waiting or decoding.rows:
        for _ in range(min(joining, decoding.free_slots, len(waiting))):
            decoding.join(waiting.pop(0))
        for decoded in decoding.step():
            assert (tokens[decoded.row][decoded.positions] == -1).all()
            tokens[decoded.row][decoded.positions] = decoded.tokens
            if decoded.is_finished:
                finished.add(decoded.row)
    assert finished == set(rows)
    assert decoding.free_slots == max_rows
    return [tokens[row] for row in rows]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(("max_rows", "joining"), [(1, 1), (3, 1), (5, 2), (12, 12)])
def test_each_row_gets_the_tokens_it_gets_alone(query: str, max_rows: int, joining: int) -> None:
    model, rows = model_of(query), rows_of_all_kinds()
    for row, tokens_L in zip(rows, decode_all(model, rows, max_rows, joining), strict=True):
        np.testing.assert_array_equal(tokens_L, alone(model, row))


def test_full_length_rows_equal_a_batch_of_sample() -> None:
    model = model_for("pgm_uniform").eval()
    known_BL = known_prefixes([[3, 4], [5, 6], []], LENGTH, BOS)
    config = SamplerConfig(steps=5)
    whole = sample(
        model, VOCABULARY, LENGTH, config, known_BL=known_BL, seed=9, batch_sequences=3, device="cpu"
    )
    rows = [Row(known_L, 9, number, config) for number, known_L in enumerate(known_BL)]
    np.testing.assert_array_equal(np.stack(decode_all(model, rows, 2, 1)), whole.tokens_BL)


def test_a_model_that_is_not_folded_decodes_too() -> None:
    model, rows = model_of(decoder_blocks=0), rows_of_all_kinds()
    assert type(StepwiseDecoding(model, VOCABULARY, 4, "cpu").model) is type(model)
    for row, tokens_L in zip(rows, decode_all(model, rows, 4, 2), strict=True):
        np.testing.assert_array_equal(tokens_L, alone(model, row))


def test_the_longer_model_is_not_paid_for() -> None:
    """Positions behind a row's end are neither read nor asked for."""
    model = model_of()
    calls: list[tuple[int, int]] = []
    row = Row(np.array([BOS, 3, -1, -1]), 1, 0, SamplerConfig(steps=2))
    decoding = StepwiseDecoding(model, VOCABULARY, 4, "cpu")
    predict = decoding.model.predict

    def noting(encoded_TH: torch.Tensor, factors: Any, positions_Q: torch.Tensor, *others: Any) -> Any:
        calls.append((len(encoded_TH), len(positions_Q)))
        return predict(encoded_TH, factors, positions_Q, *others)

    decoding.model.predict = noting
    decoding.join(row)
    while decoding.rows:
        decoding.step()
    assert calls == [(2, 1), (3, 1)]


def test_a_row_that_leaves_frees_its_slot_and_changes_nothing_for_the_others() -> None:
    model, (first, second, third, *_) = model_of(), rows_of_all_kinds()
    first = replace(first, config=SamplerConfig(steps=8), known_L=np.array([BOS, *[-1] * 12]))
    decoding = StepwiseDecoding(model, VOCABULARY, 2, "cpu")
    decoding.join(first)
    decoding.join(second)
    decoding.step()
    decoding.leave(first)
    decoding.leave(first)
    assert first not in decoding.rows
    decoding.join(third)
    tokens = {second: alone(model, second), third: alone(model, third)}
    while decoding.rows:
        for decoded in decoding.step():
            assert decoded.row is not first
            np.testing.assert_array_equal(tokens[decoded.row][decoded.positions], decoded.tokens)


def test_rows_with_different_rules_are_drawn_as_each_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepwise_module, "_CHUNK_QUERIES", 3)
    generator = torch.Generator().manual_seed(1)
    hidden_QH = torch.randn(9, 6, generator=generator)
    weight_VH = torch.randn(SIZE, 6, generator=generator) * 2
    rules = (TokenRules((MASK,), 0.5), TokenRules((MASK,), 1.0, 0.6), TokenRules((MASK,), 0.5))
    targets_S, uniforms_Q = np.array([2, 4, 1]), torch.rand(7, generator=generator, dtype=torch.float64)
    linear: Any = lambda hidden: hidden @ weight_VH.T  # noqa: E731
    drawn_Q = RowwiseDraw(rules, targets_S, uniforms_Q)(hidden_QH, linear)
    starts = [0, 2, 6, 7]
    expected = [
        TokenDraw(rule, uniforms_Q[start:end])(hidden_QH[start:end], linear)
        for rule, start, end in zip(rules, starts, starts[1:], strict=False)
    ]
    assert torch.equal(drawn_Q, torch.cat(expected))


def test_a_row_of_one_known_token_and_one_unknown_takes_one_step() -> None:
    torch.manual_seed(0)
    model: Any = build_model(model_of().config, SIZE, LENGTH).eval()
    decoding = StepwiseDecoding(model, VOCABULARY, 1, "cpu")
    assert decoding.step() == []
    row = Row(np.array([BOS, -1]), 1, 0, SamplerConfig(steps=100))
    decoding.join(row)
    (decoded,) = decoding.step()
    assert (decoded.row, decoded.positions, decoded.is_finished) == (row, [1], True)


def test_a_model_with_int8_weights_decodes_too() -> None:
    model, rows = model_of(), rows_of_all_kinds()[:4]
    quantize_blocks(model)
    for row, tokens_L in zip(rows, decode_all(model, rows, 2, 1), strict=True):
        np.testing.assert_array_equal(tokens_L, alone(model, row))
