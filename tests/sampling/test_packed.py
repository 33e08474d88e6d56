"""Packed prediction of the class-conditional Partition Transformer, registers included, against the group mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgm_scale.config import SamplerConfig
from pgm_scale.diffusion.mask_schedules import decoded_counts
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import DecodingStep, decode
from pgm_scale.sampling.engine import fold
from pgm_scale.sampling.packed import in_equal_rows, packed_inputs, predict_packed, without_latest
from pgm_scale.sampling.pgm_naive import predict_by_groups
from tests.models import oracle
from tests.models.builders import CLASSES, image_config
from tests.sampling.image_models import BOS, CODES, LENGTH, MASK, VOCABULARY

STEPS = 6


def model_of(registers: int, query: str = "learn+freqs") -> Any:
    torch.manual_seed(2)
    model = PartitionTransformer(image_config(registers, query), VOCABULARY.size, LENGTH)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.eval()


def batch_of(known_B: list[int]) -> SamplingBatch:
    """Rows of which so many codes are known, anywhere, each with a class of its own (the last has none)."""
    generator = np.random.default_rng(1)
    known_BL = np.full((len(known_B), LENGTH), -1)
    known_BL[:, 0] = BOS
    for row, known in enumerate(known_B):
        known_BL[row, 1 + generator.permutation(CODES)[:known]] = generator.integers(0, MASK, known)
    labels_B = CLASSES - np.arange(len(known_B))[::-1]
    numbers_B = np.arange(len(known_B))
    return SamplingBatch(
        known_BL, numbers_B, 3, VOCABULARY, SamplerConfig(kind="halton"), torch.device("cpu"), labels_B
    )


def plan(batch: SamplingBatch) -> np.ndarray:
    """Each row's unknown codes in an order of its own, as many a step as the arccos schedule says."""
    step_BL = np.full(batch.known_BL.shape, -1)
    for step_L, unknown_L, u_L in zip(step_BL, batch.unknown_BL, batch.uniforms_BL("order"), strict=True):
        positions = np.flatnonzero(unknown_L)
        counts = decoded_counts(STEPS, len(positions))
        order = positions[np.argsort(u_L[positions])]
        step_L[order] = np.searchsorted(counts, np.arange(len(order)), side="right")
    return step_BL


def steps_of(model: Any, batch: SamplingBatch) -> list[DecodingStep]:
    """Those of a real run."""
    steps: list[DecodingStep] = []

    def predict(model: Any, batch: SamplingBatch, step: DecodingStep) -> Tensor:
        steps.append(replace(step, tokens_BL=step.tokens_BL.clone()))
        return predict_packed(model, batch, step)

    decode(model, predict, batch, plan(batch))
    return steps


def logits_by_groups(model: Any, batch: SamplingBatch, step: DecodingStep) -> Tensor:
    """fp64 of the targets, row-major: whole rows under dense masks, masked codes being group 1."""
    masked_BL = torch.from_numpy(step.masked_BL)
    assert batch.labels_B is not None
    classes_B = torch.from_numpy(batch.labels_B[step.rows_B])
    state = dict(model.named_parameters())
    logits = oracle.partition_transformer(state, model.config, step.tokens_BL, masked_BL.long(), classes_B)
    return logits[torch.from_numpy(step.target_BL)]


def logits_packed(model: Any, batch: SamplingBatch, step: DecodingStep, clean_BL: np.ndarray) -> Tensor:
    assert batch.labels_B is not None
    classes_B = torch.from_numpy(batch.labels_B[step.rows_B])
    return model(packed_inputs(step.tokens_BL, clean_BL, step.target_BL, model.config.registers, classes_B))


@pytest.mark.parametrize("registers", [0, 2, 4])
@pytest.mark.parametrize("query", ["learn+freqs", "learn+freqs+mean"])
@torch.no_grad()
def test_packed_logits_equal_the_group_mask_at_every_step(registers: int, query: str) -> None:
    model, batch = model_of(registers, query), batch_of([0, 0, 0])
    steps = steps_of(model, batch)
    assert len(steps) == STEPS
    for step in steps:
        expected = logits_by_groups(model, batch, step)
        actual = logits_packed(model, batch, step, ~step.masked_BL)
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [2, 4])
@torch.no_grad()
def test_the_register_offset_changes_the_logits_of_every_step(registers: int) -> None:
    """The published samplers cut the keys at the number of clean tokens, with the registers in front of them."""
    model, batch = model_of(registers), batch_of([0, 0, 0])
    order_BL = np.where(batch.unknown_BL, batch.uniforms_BL("order"), -1.0)
    rank_BL = np.argsort(np.argsort(order_BL, axis=1), axis=1)  # as `plan` decodes them; BOS is first
    for step in steps_of(model, batch):
        quirky = logits_packed(
            model, batch, step, without_latest(~step.masked_BL, rank_BL[step.rows_B], registers // 2)
        )
        right = logits_by_groups(model, batch, step)
        assert ((quirky - right).abs().amax(-1) > 1e-3).all()
        # The last R/2 of [registers, clean tokens in their order] are no keys: as if they were masked.
        hidden_BL = np.zeros_like(step.masked_BL)
        for hidden_L, masked_L, rank_L in zip(hidden_BL, step.masked_BL, rank_BL[step.rows_B], strict=True):
            clean = sorted(np.flatnonzero(~masked_L), key=lambda i: rank_L[i])
            hidden_L[clean[len(clean) - registers // 2 :]] = True
        expected = logits_by_groups(model, batch, replace(step, masked_BL=step.masked_BL | hidden_BL))
        torch.testing.assert_close(quirky.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_latest_tokens_are_left_out_and_no_others() -> None:
    clean_BL = np.array([[True, True, False, True], [True, False, False, False]])
    rank_BL = np.array([[0, 3, 1, 2], [0, 1, 2, 3]])
    assert without_latest(clean_BL, rank_BL, 0).tolist() == clean_BL.tolist()
    assert without_latest(clean_BL, rank_BL, 1).tolist() == [[True, False, False, True], [False] * 4]
    assert without_latest(clean_BL, rank_BL, 2).tolist() == [[True, False, False, False], [False] * 4]


@pytest.mark.parametrize("known_B", [[0, 0, 0, 0], [0, 5, 0, 11], [3, 5, 15, 16]])
@torch.no_grad()
def test_packed_and_naive_samplers_draw_the_same_codes_for_rows_of_any_progress(known_B: list[int]) -> None:
    model, batch = model_of(2), batch_of(known_B)
    packed_BL, _ = decode(model, predict_packed, batch, plan(batch))
    naive_BL, _ = decode(model, predict_by_groups, batch, plan(batch))
    assert torch.equal(packed_BL, naive_BL)
    assert (packed_BL.numpy()[~batch.unknown_BL] == batch.known_BL[~batch.unknown_BL]).all()
    for row in range(len(known_B)):  # and alone
        alone = replace(
            batch,
            known_BL=batch.known_BL[row : row + 1],
            sample_numbers_B=batch.sample_numbers_B[row : row + 1],
            labels_B=batch.labels_B[row : row + 1],  # type: ignore[index]
        )
        assert torch.equal(decode(model, predict_packed, alone, plan(alone))[0][0], packed_BL[row])


def test_rows_are_predicted_with_those_of_equal_counts_and_come_back_in_their_order() -> None:
    batch = batch_of([0, 5, 0, 11])
    calls = []

    def predict(_: Any, batch: SamplingBatch, step: DecodingStep) -> Tensor:
        counts = {(int(m.sum()), int(t.sum())) for m, t in zip(step.masked_BL, step.target_BL, strict=True)}
        assert len(counts) == 1
        assert len(step.uniforms_Q) == step.target_BL.sum()
        calls.append(step.rows_B.tolist())
        rows_Q, positions_Q = np.nonzero(step.target_BL)
        assert torch.equal(step.tokens_BL[:, 0], torch.full((len(step.rows_B),), BOS))
        return torch.from_numpy(1000 * step.rows_B[rows_Q] + positions_Q)

    target_BL = plan(batch) == 1
    step = DecodingStep(
        number=1,
        rows_B=np.arange(4),
        tokens_BL=batch.canvas_BL(),
        masked_BL=plan(batch) >= 1,
        target_BL=target_BL,
        uniforms_Q=batch.uniforms_BL("token")[target_BL],
    )
    drawn = in_equal_rows(predict)(None, batch, step)
    rows_Q, positions_Q = np.nonzero(target_BL)
    assert drawn.tolist() == (1000 * rows_Q + positions_Q).tolist()
    assert sorted(calls) == [[0, 2], [1], [3]]


def test_a_class_conditional_model_is_not_folded() -> None:
    model = model_of(2)
    assert fold(model) is model
