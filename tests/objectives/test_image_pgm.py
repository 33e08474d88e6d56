"""The partition objective of images: what is grouped, predicted, scored and dropped, against dense computations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgm_scale.config import ImagePGMObjectiveConfig
from pgm_scale.data import TokenBatch, Vocabulary
from pgm_scale.diffusion.draws import stratified_uniform
from pgm_scale.errors import UserError
from pgm_scale.objectives import DrawSpec, build_objective, loss_terms
from tests.models import oracle
from tests.models.builders import CLASSES, LENGTH, VOCAB, image_config, randomised

MASK, BOS = VOCAB - 2, VOCAB - 1
VOCABULARY = Vocabulary(size=VOCAB, mask_id=MASK, bos_id=BOS, eos_id=BOS, pad_id=None)
SPEC = DrawSpec(seed=7, global_batch_sequences=64)
REGISTERS = 2


def objective(registers=REGISTERS, **settings):
    return build_objective(ImagePGMObjectiveConfig(**settings), VOCABULARY, image_config(registers))


def images(count, length=LENGTH, first=0):
    tokens_BL = np.random.default_rng(first).integers(0, MASK, (count, length))
    tokens_BL[:, 0] = BOS
    labels_B = np.arange(count) % CLASSES
    return TokenBatch(tokens_BL, np.ones_like(tokens_BL, bool), np.arange(first, first + count), labels_B)


def groups_of(inputs, sequences, length=LENGTH, registers=REGISTERS):
    """bool [B, R + L], True in group 1, read off the packed keys."""
    packed, groups = inputs.partition, np.zeros((sequences, registers + length), bool)
    for j, positions in enumerate(packed.positions_T.split(packed.segments.lengths)):
        groups[j // 2, positions.numpy()] = j % 2
    return groups


@pytest.mark.parametrize("registers", [0, 2, 4])
@pytest.mark.parametrize("inputs_of", ["training_inputs", "validation_inputs"])
def test_keys_are_registers_bos_and_codes_and_queries_are_the_codes(registers, inputs_of):
    batch, half = images(16), registers // 2
    inputs = getattr(objective(registers), inputs_of)(batch, SPEC)
    packed = inputs.partition
    keys, queries = packed.segments.lengths, packed.query_segments.lengths
    assert packed.tokens_T.shape == packed.positions_T.shape == (16 * (registers + LENGTH),)
    assert packed.query_positions_Q.shape == inputs.targets_Q.shape == (16 * (LENGTH - 1),)
    for b in range(16):
        seen: dict[int, tuple[int, int]] = {}
        for group in (0, 1):
            own = slice(sum(keys[: 2 * b + group]), sum(keys[: 2 * b + group + 1]))
            seen |= {
                int(p): (int(t), group)
                for p, t in zip(packed.positions_T[own], packed.tokens_T[own], strict=True)
            }
        assert sorted(seen) == list(range(registers + LENGTH))
        assert [seen[r] for r in range(registers)] == [(-1 - r, int(r < half)) for r in range(registers)]
        assert seen[registers] == (BOS, 0)
        assert [seen[registers + i][0] for i in range(LENGTH)] == batch.tokens_BL[b].tolist()
        for j, group in ((2 * b, 1), (2 * b + 1, 0)):  # the groups swapped
            own = slice(sum(queries[:j]), sum(queries[: j + 1]))
            asked = packed.query_positions_Q[own].tolist()
            assert sorted(asked) == [p for p in sorted(seen) if p > registers and seen[p][1] == group]
            assert inputs.targets_Q[own].tolist() == [seen[p][0] for p in asked]


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("label_drop", [0.0, 0.5])
def test_loss_and_gradients_are_the_mean_cross_entropy_of_all_codes(registers, label_drop):
    config = image_config(registers)
    model, target = randomised(config), objective(registers, label_drop=label_drop)
    batch = images(8)
    inputs = target.training_inputs(batch, SPEC)
    terms = loss_terms(target, model, inputs)
    loss = terms.loss_S.sum() / target.scored_tokens(batch).sum()

    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    groups_BL = torch.from_numpy(groups_of(inputs, 8, registers=registers)[:, registers:]).long()
    tokens_BL, classes_B = torch.from_numpy(batch.tokens_BL), inputs.partition.classes_B
    logits = oracle.partition_transformer(state, config, tokens_BL, groups_BL, classes_B)[:, 1:]
    without_mask = torch.cat([logits[..., :MASK], logits[..., BOS:]], -1)  # BOS keeps its logit
    log_p = without_mask.log_softmax(-1).gather(-1, tokens_BL[:, 1:, None])
    expected = -log_p.sum() / (8 * (LENGTH - 1))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-5, rtol=1e-4, msg=name)

    assert target.scored_tokens(batch).tolist() == [LENGTH - 1] * 8
    assert terms.scored_tokens_S.reshape(8, 2).sum(axis=1).tolist() == [LENGTH - 1] * 8
    np.testing.assert_allclose(terms.mask_fraction_S.reshape(8, 2).sum(axis=1), 1.0)
    assert not target.is_likelihood


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_codes_are_in_group_1_by_coins_of_the_schedules_probability(schedule):
    length, numbers = 400, np.arange(64)
    inputs = objective(mask_schedule=schedule).training_inputs(images(64, length), SPEC)
    groups = groups_of(inputs, 64, length)[:, REGISTERS + 1 :]
    u_B = stratified_uniform(SPEC.seed, numbers, 64, "training/time")
    ratio_B = 2 / math.pi * np.arccos(u_B) if schedule == "arccos" else np.cos(math.pi * u_B / 2)
    deviations = (groups.mean(axis=1) - ratio_B) / np.sqrt(ratio_B * (1 - ratio_B) / (length - 1))
    assert 0.7 < deviations.std() < 1.3  # neither the same count in each row, nor wider than coins
    assert abs(deviations.mean()) < 0.5
    # No neighbour tells anything of a coin.
    centred = (groups - groups.mean(axis=1, keepdims=True))[:, :-1] * (
        groups - groups.mean(axis=1, keepdims=True)
    )[:, 1:]
    assert abs(centred.mean()) < 0.005


def test_labels_are_dropped_at_the_configured_rate_in_training_alone():
    batch = images(4000)
    target = objective(label_drop=0.1)
    trained_B = target.training_inputs(batch, SPEC).partition.classes_B.numpy()
    is_dropped_B = trained_B == CLASSES
    assert is_dropped_B.mean() == pytest.approx(0.1, abs=0.02)
    np.testing.assert_array_equal(trained_B[~is_dropped_B], batch.labels_B[~is_dropped_B])
    assert np.unique(batch.labels_B[is_dropped_B]).size == CLASSES  # whatever the class
    kept = target.validation_inputs(batch, SPEC).partition.classes_B.numpy()
    np.testing.assert_array_equal(kept, batch.labels_B)
    never = objective(label_drop=0.0).training_inputs(batch, SPEC).partition.classes_B
    always = objective(label_drop=1.0).training_inputs(batch, SPEC).partition.classes_B
    assert (never.numpy() == batch.labels_B).all()
    assert (always == CLASSES).all()


def test_whether_a_label_is_dropped_does_not_decide_the_partition():
    batch = images(2000)
    inputs = objective(label_drop=0.5).training_inputs(batch, DrawSpec(7, 2000))
    is_dropped_B = inputs.partition.classes_B.numpy() == CLASSES
    in_group1_B = inputs.rows.mask_fraction_S[::2]
    assert abs(np.corrcoef(is_dropped_B, in_group1_B)[0, 1]) < 0.1


def test_a_group_without_codes_is_trained_too():
    """u near 1 leaves group 1 empty, with the registers or with nothing."""
    for registers in (0, 2):
        model, target = randomised(image_config(registers)), objective(registers)
        batch = images(64)
        inputs = target.training_inputs(batch, SPEC)
        assert 0 in inputs.rows.scored_tokens_S
        terms = loss_terms(target, model, inputs)
        terms.loss_S.sum().backward()
        assert terms.loss_S.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_data_without_labels_or_with_too_many_classes_are_refused():
    batch = images(4)
    for inputs_of in ("training_inputs", "validation_inputs"):
        with pytest.raises(UserError, match="the data have no labels"):
            getattr(objective(), inputs_of)(replace(batch, labels_B=None), SPEC)
        with pytest.raises(UserError, match=r"labels from 1 to 5, but model.num_classes is 5"):
            getattr(objective(), inputs_of)(replace(batch, labels_B=np.array([1, 5, 2, 3])), SPEC)
