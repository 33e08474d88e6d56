"""SDTT against a rollout by hand: a table model as the teacher, one token at a time, float64 and no packing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pgm_scale.config import MDLMObjectiveConfig, PGMObjectiveConfig, SDTTObjectiveConfig
from pgm_scale.data import TokenBatch
from pgm_scale.objectives.base import DrawSpec, loss_terms
from pgm_scale.objectives.mdlm import MDLMObjective
from pgm_scale.objectives.pgm import PGMObjective
from pgm_scale.objectives.sdtt import SDTTInputs, SDTTObjective
from tests.objectives.tiny import (
    LENGTH,
    SEQUENCE,
    VOCABULARY,
    MaskedTable,
    PartitionTable,
    TableModel,
    copies,
)

SPEC = DrawSpec(seed=5, global_batch_sequences=16)


class TableTeacher:
    """Another table than the student's: its logits are those of the student's, turned around."""

    def __init__(self, model: TableModel) -> None:
        with torch.no_grad():
            model.table.copy_(-model.table.flip(0))
        self.model = model

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        with torch.no_grad():
            yield self.model


def objective_of(kind: str, **options: Any) -> SDTTObjective:
    likelihood: Any = (
        PGMObjective(PGMObjectiveConfig(), VOCABULARY)
        if kind == "pgm"
        else MDLMObjective(MDLMObjectiveConfig(), VOCABULARY)
    )
    settings: dict[str, Any] = {"teacher": "x", "sampling_steps": 4, "round_steps": 2}
    config = SDTTObjectiveConfig(**settings | options)
    objective = SDTTObjective(config, VOCABULARY, likelihood)
    objective.teacher = TableTeacher(PartitionTable() if kind == "pgm" else MaskedTable())
    return objective


def student_of(kind: str) -> TableModel:
    return PartitionTable() if kind == "pgm" else MaskedTable()


DIVERGENCES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "reverse_kl": lambda p, q: float((p * np.log(p / q)).sum()),
    "forward_kl": lambda p, q: float((q * np.log(q / p)).sum()),
    "mse": lambda p, q: float((np.log(p / q) ** 2).sum() / VOCABULARY.size),
    "tvd": lambda p, q: float(0.5 * np.abs(p - q).sum()),
}


def probabilities(model: TableModel, visible_L: np.ndarray) -> np.ndarray:
    """float64 [L, V - 1]: of each position given the visible tokens, the mask removed."""
    logits_LV = (
        model.logits_of(torch.from_numpy(visible_L)[None])[0].detach().numpy()[:, : VOCABULARY.mask_id]
    )
    exp_LV = np.exp(logits_LV)
    return exp_LV / exp_LV.sum(axis=1, keepdims=True)


def loss_by_hand(objective: SDTTObjective, kind: str, inputs: SDTTInputs, batch: TokenBatch) -> np.ndarray:
    """float64 [views]: the sum of the divergences of each view's masked tokens."""
    teacher: Any = objective.teacher
    student, rollout = student_of(kind), inputs.rollout
    uniforms = iter(rollout.uniforms_O.tolist())
    sums = []
    for view, (masked_L, opened_L) in enumerate(zip(rollout.masked_VL, rollout.opened_VL, strict=True)):
        tokens_L = batch.tokens_BL[view % len(batch.tokens_BL)]
        visible_L = np.where(masked_L, VOCABULARY.mask_id, tokens_L)
        first_LV, own_LV = probabilities(teacher.model, visible_L), probabilities(student, visible_L)
        for position in np.flatnonzero(opened_L):
            cumulative = np.cumsum(first_LV[position])
            visible_L[position] = int(np.searchsorted(cumulative, next(uniforms), side="right"))
        second_LV = probabilities(teacher.model, visible_L)
        total = 0.0
        for position in np.flatnonzero(masked_L):
            taught_V = first_LV[position] if opened_L[position] else second_LV[position]
            total += DIVERGENCES[objective.config.divergence](own_LV[position], taught_V)
        sums.append(total)
    return np.array(sums)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("kind", "groups"), [("pgm", "one"), ("pgm", "two"), ("mdlm", "one")])
def test_loss_is_that_of_a_rollout_by_hand(kind: str, groups: str, divergence: str) -> None:
    objective = objective_of(kind, groups=groups, divergence=divergence)
    batch = copies(16)
    inputs = objective.training_inputs(batch, SPEC)
    assert inputs.rollout.opened_VL.any()
    assert (inputs.rollout.masked_VL & ~inputs.rollout.opened_VL).any()
    terms = loss_terms(objective, student_of(kind), inputs)
    expected = loss_by_hand(objective, kind, inputs, batch)
    np.testing.assert_allclose(terms.loss_S.detach().numpy(), expected, rtol=2e-5, atol=1e-6)
    assert (
        objective.loss_tokens(batch, inputs) == inputs.rollout.masked_VL.sum() == terms.scored_tokens_S.sum()
    )


@pytest.mark.parametrize("kind", ["pgm", "mdlm"])
def test_gradient_reaches_the_student_and_not_the_teacher(kind: str) -> None:
    objective, student = objective_of(kind), student_of(kind)
    terms = loss_terms(objective, student, objective.training_inputs(copies(16), SPEC))
    terms.loss_S.sum().backward()
    teacher: Any = objective.teacher
    assert student.table.grad is not None
    assert float(student.table.grad.abs().max()) > 0
    assert teacher.model.table.grad is None


def test_two_groups_mask_each_token_once() -> None:
    inputs = objective_of("pgm", groups="two").training_inputs(copies(16), SPEC)
    masked_VL = inputs.rollout.masked_VL
    assert (masked_VL[:16] ^ masked_VL[16:]).all()
    assert inputs.scored_V.sum() == 16 * LENGTH


@pytest.mark.parametrize("complement", [False, True])
def test_first_step_opens_dt_over_t_of_the_masked_tokens(complement: bool) -> None:
    """Time is stratified over the batch, so the tokens of each tenth of it are those of a known mean time."""
    count = 4000
    tokens_BL = np.tile(SEQUENCE, (count, 20))
    batch = TokenBatch(tokens_BL, np.ones_like(tokens_BL, bool), np.arange(count))
    spec = DrawSpec(seed=1, global_batch_sequences=count)
    objective = objective_of("pgm", groups="two", sampling_steps=8)
    rollout = objective.training_inputs(batch, spec).rollout
    view = slice(count, None) if complement else slice(0, count)
    masked_BL, opened_BL = rollout.masked_VL[view], rollout.opened_VL[view]
    t_B = (np.arange(count) + 0.5) / count
    time_B = 1 - t_B if complement else t_B  # up to the schedule's epsilon of 1e-3
    for tenth in range(10):
        rows = slice(tenth * count // 10, (tenth + 1) * count // 10)
        expected = np.minimum(1, objective.step_time(0) / time_B[rows])
        masked = masked_BL[rows].sum(axis=1)
        mean = (expected * masked).sum() / masked.sum()
        assert opened_BL[rows].sum() / masked.sum() == pytest.approx(mean, abs=0.02)


def test_rounds_follow_from_the_sample_number() -> None:
    objective = objective_of("pgm", sampling_steps=64, round_steps=3)
    assert [round(1 / objective.step_time(step)) for step in (0, 2, 3, 6, 8, 9)] == [64, 64, 32, 16, 16, 8]
    tokens_BL = np.tile(SEQUENCE, (512, 20))
    for step in (0, 3, 6, 9):
        numbers_B = step * 512 + np.arange(512)
        batch = TokenBatch(tokens_BL, np.ones_like(tokens_BL, bool), numbers_B)
        rollout = objective.training_inputs(batch, DrawSpec(1, 512)).rollout
        dt = objective.step_time(step)
        expected = 2 * dt - dt**2  # the mean of min(t, dt) over the mean of t, by tokens
        assert rollout.opened_VL.sum() / rollout.masked_VL.sum() == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("groups", ["one", "two"])
def test_inputs_do_not_depend_on_the_micro_batch(groups: str) -> None:
    objective, batch = objective_of("pgm", groups=groups), copies(16)
    whole = objective.training_inputs(batch, SPEC)
    sums = np.zeros(16)
    for start in range(0, 16, 4):
        rows = slice(start, start + 4)
        part = TokenBatch(batch.tokens_BL[rows], batch.valid_BL[rows], batch.sample_numbers_B[rows])
        inputs = objective.training_inputs(part, SPEC)
        terms = loss_terms(objective, PartitionTable(), inputs)
        sums[rows] = terms.loss_of_sequences(4)
    expected = loss_terms(objective, PartitionTable(), whole).loss_of_sequences(16)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


def test_padding_and_stray_masks_are_not_scored() -> None:
    batch = copies(16)
    batch.valid_BL[:, -1] = False
    batch.tokens_BL[:, 0] = VOCABULARY.mask_id
    inputs = objective_of("mdlm").training_inputs(batch, SPEC)
    positions = inputs.scored_N.numpy() % LENGTH
    assert set(positions) == {1}
    assert inputs.rollout.masked_VL[:, [0, 2]].any()


def test_validation_is_that_of_the_pretraining() -> None:
    objective = objective_of("mdlm")
    batch = copies(4)
    mine = loss_terms(objective, MaskedTable(), objective.validation_inputs(batch, SPEC))
    theirs = loss_terms(
        objective.likelihood, MaskedTable(), objective.likelihood.validation_inputs(batch, SPEC)
    )
    assert torch.equal(mine.loss_S, theirs.loss_S)
