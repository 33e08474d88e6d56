"""The packed layout of a partition, and the loss of the real network against a dense computation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.config import PGMObjectiveConfig
from pgm_scale.data import TokenBatch, Vocabulary
from pgm_scale.diffusion import LogLinearSchedule
from pgm_scale.objectives import DrawSpec, loss_terms
from pgm_scale.objectives.base import training_times
from pgm_scale.objectives.pgm import PGMObjective
from tests.models import oracle
from tests.models.builders import LENGTH, VOCAB, partition_config, randomised

MASK = VOCAB - 1
VOCABULARY = Vocabulary(size=VOCAB, mask_id=MASK, bos_id=0, eos_id=0, pad_id=MASK)
FORMS = ["published", "bounded", "count"]


def batch_of(sequences: int, length: int = LENGTH, first: int = 0, pads: int = 0) -> TokenBatch:
    """Random tokens; the last `pads` of the odd sequences are padding, with the mask's id as in GPT-2 data."""
    tokens_BL = np.random.default_rng(first).integers(0, MASK, (sequences, length))
    valid_BL = np.ones_like(tokens_BL, bool)
    if pads:
        tokens_BL[1::2, -pads:] = MASK
        valid_BL[1::2, -pads:] = False
    return TokenBatch(tokens_BL, valid_BL, np.arange(first, first + sequences))


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    sequences=st.integers(1, 5),
    length=st.integers(1, 9),
    pads=st.integers(0, 2),
    first=st.integers(0, 1000),
    validation=st.booleans(),
)
def test_packed_layout(form, sequences, length, pads, first, validation):
    batch = batch_of(sequences, length, first, min(pads, length - 1))
    objective = PGMObjective(PGMObjectiveConfig(form=form), VOCABULARY)
    spec = DrawSpec(3, 16)
    inputs = (
        objective.validation_inputs(batch, spec) if validation else objective.training_inputs(batch, spec)
    )
    packed = inputs.partition
    keys, queries = packed.segments.lengths, packed.query_segments.lengths
    assert sum(keys) == sum(queries) == sequences * length
    assert keys[0::2] == queries[1::2]  # the groups of a sequence, swapped
    assert keys[1::2] == queries[0::2]
    assert inputs.rows.mask_fraction_S.tolist() == [n / length for n in queries]
    positions_BL = packed.positions_T.view(sequences, length).numpy()
    query_positions_BL = packed.query_positions_Q.view(sequences, length).numpy()
    np.testing.assert_array_equal(np.sort(positions_BL), np.sort(query_positions_BL))
    np.testing.assert_array_equal(np.sort(positions_BL), np.tile(np.arange(length), (sequences, 1)))
    np.testing.assert_array_equal(
        packed.tokens_T.view(sequences, length), np.take_along_axis(batch.tokens_BL, positions_BL, axis=1)
    )
    targets = np.take_along_axis(batch.tokens_BL, query_positions_BL, axis=1)
    valid = np.take_along_axis(batch.valid_BL, query_positions_BL, axis=1)
    np.testing.assert_array_equal(inputs.targets_Q.view(sequences, length)[valid], targets[valid])
    assert (inputs.targets_Q != MASK).all()
    # Query segment j holds exactly the positions that are not in key segment j.
    key_positions = packed.positions_T.split(keys)
    query_positions = packed.query_positions_Q.split(queries)
    for key, query in zip(key_positions, query_positions, strict=True):
        assert sorted(key.tolist() + query.tolist()) == list(range(length))
    # Each scored query belongs to one of its sequence's rows, and rows follow the segments.
    scored_B2L = inputs.scored_B2L.numpy()
    np.testing.assert_array_equal(scored_B2L.sum(axis=1), valid)
    for b in range(sequences):
        assert not scored_B2L[b, 0, queries[2 * b] :].any()
        assert not scored_B2L[b, 1, : queries[2 * b]].any()
    assert inputs.rows.sequence_S.tolist() == [b for b in range(sequences) for _ in (0, 1)]
    assert np.isfinite(inputs.rows.weight_S.numpy()).all()


@settings(max_examples=40, deadline=None)
@given(sequences=st.integers(1, 12), length=st.integers(1, 9), seed=st.integers(0, 99))
def test_count_form_weights_and_strata(sequences, length, seed):
    objective = PGMObjective(PGMObjectiveConfig(form="count"), VOCABULARY)
    batch = batch_of(sequences, length, first=7 * sequences)
    partition = objective.training_partition(batch, DrawSpec(seed, sequences))
    sizes_B = partition.in_group1_BL.sum(axis=1)
    sizes_B2 = np.stack([sizes_B, length - sizes_B], axis=1)
    total = partition.weight_B2 * sizes_B2
    np.testing.assert_allclose(total[sizes_B2 > 0], (length + 1) / 2)
    # Stratified: sorted, the sizes are never further from an even spread than one stratum.
    even = (np.arange(sequences) + 0.5) / sequences * (length + 1)
    assert (np.abs(sizes_B + 0.5 - even) <= 0.5 + 0.5 * (length + 1) / sequences + 1e-9).all()


@pytest.mark.parametrize("form", FORMS)
def test_weights_do_not_exceed_their_bound(form):
    objective = PGMObjective(PGMObjectiveConfig(form=form), VOCABULARY)
    weights = objective.training_partition(batch_of(4096), DrawSpec(0, 4096)).weight_B2
    bound = {"published": 1e6, "bounded": 500.0, "count": (LENGTH + 1) / 2}[form]
    assert weights.min() >= 0
    assert weights.max() <= bound * (1 + 1e-12)


def dense_loss(model, config, batch, groups_BL, weight_B2):
    """Weighted NLL sum, fp32, from whole sequences and dense masks."""
    state = dict(model.named_parameters())
    logits = oracle.partition_transformer(
        state, config, torch.from_numpy(batch.tokens_BL), torch.from_numpy(groups_BL).long()
    )
    nll_BL = torch.nn.functional.cross_entropy(
        logits[..., :MASK].flatten(0, 1),
        torch.from_numpy(np.where(batch.valid_BL, batch.tokens_BL, 0)).flatten(),
        reduction="none",
    ).view(batch.tokens_BL.shape)
    weight_BL = np.where(groups_BL, weight_B2[:, :1], weight_B2[:, 1:]) * batch.valid_BL
    return (nll_BL * torch.from_numpy(weight_BL)).sum().float()


def plain_weights(form, batch, spec, groups_BL):
    """The weights of (group 1, group 0) as the module's docstring states them."""
    if form == "count":
        n_B = groups_BL.sum(axis=1)
        with np.errstate(divide="ignore"):
            return np.stack([(LENGTH + 1) / n_B, (LENGTH + 1) / (LENGTH - n_B)], axis=1) / 2
    t_B = training_times(batch, spec, 1e-3)
    group0 = 1 / (1 - t_B) if form == "published" else (1 - 1e-3) / LogLinearSchedule().alpha(t_B)
    return np.stack([1 / t_B, group0], axis=1) / 2


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_equal_the_dense_computation(form):
    config = partition_config()
    model = randomised(config)
    batch, spec = batch_of(8, pads=3), DrawSpec(5, 8)
    objective = PGMObjective(PGMObjectiveConfig(form=form), VOCABULARY)
    groups_BL = objective.training_partition(batch, spec).in_group1_BL
    terms = loss_terms(objective, model, objective.training_inputs(batch, spec).to("cpu"))
    packed = terms.loss_S.sum()
    dense = dense_loss(model, config, batch, groups_BL, plain_weights(form, batch, spec, groups_BL))
    torch.testing.assert_close(packed, dense, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    packed_grads = torch.autograd.grad(packed, parameters)
    dense_grads = torch.autograd.grad(dense, parameters)
    for mine, theirs in zip(packed_grads, dense_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-6)


def test_validation_counts_group_1_only():
    config = partition_config()
    model = randomised(config)
    batch, spec = batch_of(8, pads=3), DrawSpec(5, 8)
    objective = PGMObjective(PGMObjectiveConfig(), VOCABULARY)
    inputs = objective.validation_inputs(batch, spec)
    groups_BL = np.zeros_like(batch.valid_BL)
    group1 = inputs.partition.query_positions_Q.split(inputs.partition.query_segments.lengths)[::2]
    for b, positions in enumerate(group1):
        groups_BL[b, positions.numpy()] = True
    assert (inputs.rows.weight_S[1::2] == 0).all()
    weight_B2 = inputs.rows.weight_S.view(-1, 2).numpy()
    assert ((weight_B2[:, 0] >= 1) & (weight_B2[:, 0] <= 1000)).all()
    terms = loss_terms(objective, model, inputs)
    dense = dense_loss(model, config, batch, groups_BL, weight_B2)
    torch.testing.assert_close(terms.loss_S.sum(), dense, rtol=1e-5, atol=1e-5)
