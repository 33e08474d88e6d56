"""What all objectives have in common, on the real networks."""

import numpy as np
import pytest
import torch

from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    ComplementaryMDLMObjectiveConfig,
    D3PMObjectiveConfig,
    MDLMObjectiveConfig,
    PGMObjectiveConfig,
)
from pgm_scale.data import TokenBatch, Vocabulary
from pgm_scale.objectives import DrawSpec, LossTerms, build_objective, loss_terms
from pgm_scale.objectives.mdlm import masked_inputs
from tests.models.builders import (
    LENGTH,
    VOCAB,
    autoregressive_config,
    diffusion_config,
    partition_config,
    randomised,
)

MASK = 5  # inside the vocabulary, as in BERT's, so that real data may hold it
VOCABULARY = Vocabulary(size=VOCAB, mask_id=MASK, bos_id=0, eos_id=0, pad_id=1)
SPEC = DrawSpec(seed=11, global_batch_sequences=8)

CASES = [
    *((PGMObjectiveConfig(form=form), partition_config()) for form in ("published", "bounded", "count")),
    (MDLMObjectiveConfig(), diffusion_config()),
    (MDLMObjectiveConfig(diffusion_steps=9, loss="low_variance"), diffusion_config(time_conditioned=True)),
    (ComplementaryMDLMObjectiveConfig(), diffusion_config(time_conditioned=True)),
    (D3PMObjectiveConfig(diffusion_steps=9, cross_entropy_weight=0.1), diffusion_config(True)),
    (D3PMObjectiveConfig(diffusion_steps=9, substitution=True), diffusion_config(True)),
    (AutoregressiveObjectiveConfig(), autoregressive_config()),
]
case = pytest.mark.parametrize(("config", "model_config"), CASES, ids=lambda c: getattr(c, "form", c.kind))


def batch_with_pads_and_mask_ids(sequences: int = 8) -> TokenBatch:
    tokens_BL = np.random.default_rng(0).integers(6, VOCAB, (sequences, LENGTH))
    tokens_BL[2, 4] = MASK
    tokens_BL[1, -4:] = 1
    valid_BL = np.ones_like(tokens_BL, bool)
    valid_BL[1, -4:] = False
    return TokenBatch(tokens_BL, valid_BL, np.arange(40, 40 + sequences))


def part(batch: TokenBatch, rows: slice) -> TokenBatch:
    return TokenBatch(batch.tokens_BL[rows], batch.valid_BL[rows], batch.sample_numbers_B[rows])


def test_loss_of_a_sequence_is_the_sum_over_its_rows():
    loss_S = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    terms = LossTerms(loss_S, loss_S.detach(), np.ones(4), np.zeros(4), np.array([1, 0, 1, 2]))
    np.testing.assert_array_equal(terms.loss_of_sequences(4), [2.0, 5.0, 8.0, 0.0])


@case
@pytest.mark.parametrize("inputs_of", ["training_inputs", "validation_inputs"])
def test_loss_of_a_sequence_does_not_depend_on_the_split_of_the_batch(config, model_config, inputs_of):
    objective, model = build_objective(config, VOCABULARY), randomised(model_config)
    batch = batch_with_pads_and_mask_ids()
    whole = loss_terms(objective, model, getattr(objective, inputs_of)(batch, SPEC))
    parts = [
        loss_terms(objective, model, getattr(objective, inputs_of)(piece, SPEC)).loss_of_sequences(n)
        for piece, n in ((part(batch, slice(0, 3)), 3), (part(batch, slice(3, 8)), 5))
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole.loss_of_sequences(8), rtol=1e-4, atol=1e-4)


@case
def test_loss_is_fp32_and_reaches_every_parameter_with_finite_gradients(config, model_config):
    objective, model = build_objective(config, VOCABULARY), randomised(model_config)
    batch = batch_with_pads_and_mask_ids()
    terms = loss_terms(objective, model, objective.training_inputs(batch, SPEC).to("cpu"))
    assert terms.cross_entropy_S is not None
    assert terms.loss_S.dtype == terms.cross_entropy_S.dtype == torch.float32
    assert not terms.cross_entropy_S.requires_grad
    (terms.loss_S.sum() / objective.scored_tokens(batch).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "vocab_embed" in name)


@case
def test_bf16_model_still_gives_an_fp32_loss(config, model_config):
    objective, model = build_objective(config, VOCABULARY), randomised(model_config).bfloat16()
    terms = loss_terms(objective, model, objective.training_inputs(batch_with_pads_and_mask_ids(), SPEC))
    assert terms.loss_S.dtype == torch.float32
    assert terms.loss_S.isfinite().all()


@case
def test_terms_describe_their_rows(config, model_config):
    objective, model = build_objective(config, VOCABULARY), randomised(model_config)
    batch = batch_with_pads_and_mask_ids()
    terms = loss_terms(objective, model, objective.training_inputs(batch, SPEC))
    rows = len(terms.loss_S)
    assert terms.cross_entropy_S is not None
    assert len(terms.cross_entropy_S) == rows
    assert len(terms.scored_tokens_S) == len(terms.mask_fraction_S) == len(terms.sequence_S) == rows
    assert ((terms.mask_fraction_S >= 0) & (terms.mask_fraction_S <= 1)).all()
    of_sequence = np.bincount(terms.sequence_S, weights=terms.scored_tokens_S, minlength=8)
    assert (of_sequence <= objective.scored_tokens(batch)).all()
    if config.kind in ("pgm", "complementary_mdlm", "autoregressive"):  # they score every token
        np.testing.assert_array_equal(of_sequence, objective.scored_tokens(batch))


@case
def test_pads_and_mask_ids_are_not_scored(config, model_config):
    objective = build_objective(config, VOCABULARY)
    scored = objective.scored_tokens(batch_with_pads_and_mask_ids())
    full = LENGTH - 1 if config.kind == "autoregressive" else LENGTH
    assert scored.tolist() == [full, full - 4, full - 1, *[full] * 5]


@pytest.mark.parametrize("config", [config for config, _ in CASES[:-1]])  # the last draws nothing
def test_training_draws_change_with_the_sample_and_validation_draws_only_with_the_seed(config):
    objective = build_objective(config, VOCABULARY)
    batch = batch_with_pads_and_mask_ids()
    later = TokenBatch(batch.tokens_BL, batch.valid_BL, batch.sample_numbers_B + 8)

    def weights(inputs):
        return np.concatenate([inputs.rows.mask_fraction_S, inputs.rows.weight_S.numpy()])

    first = weights(objective.training_inputs(batch, SPEC))
    assert (first != weights(objective.training_inputs(later, SPEC))).any()
    fixed = weights(objective.validation_inputs(batch, SPEC))
    np.testing.assert_array_equal(fixed, weights(objective.validation_inputs(batch, DrawSpec(11, 3))))
    assert (fixed != weights(objective.validation_inputs(batch, DrawSpec(12, 8)))).any()


def test_visible_mask_ids_in_the_data_do_not_count_as_masked():
    batch = batch_with_pads_and_mask_ids(sequences=3)
    masked_BL = np.zeros_like(batch.valid_BL)
    masked_BL[:, :2] = True
    inputs = masked_inputs(batch, masked_BL, np.full(3, 0.5), np.ones(3), VOCABULARY)
    assert inputs.noisy_BL[2, 4] == MASK
    np.testing.assert_array_equal(inputs.scored_BL, masked_BL)
    np.testing.assert_allclose(inputs.sigma_B, np.log(2), rtol=1e-6)


def test_complementary_copies_mask_every_token_once():
    objective = build_objective(ComplementaryMDLMObjectiveConfig(), VOCABULARY)
    batch = batch_with_pads_and_mask_ids()
    inputs = objective.training_inputs(batch, SPEC)
    first, second = inputs.scored_BL[:8].numpy(), inputs.scored_BL[8:].numpy()
    assert not (first & second).any()
    np.testing.assert_array_equal(first | second, batch.valid_BL & (batch.tokens_BL != MASK))
    np.testing.assert_allclose(np.exp(-inputs.sigma_B[:8]) + np.exp(-inputs.sigma_B[8:]), 1.0, rtol=1e-5)


def test_autoregressive_loss_is_the_next_token_cross_entropy():
    objective, model = (
        build_objective(AutoregressiveObjectiveConfig(), VOCABULARY),
        randomised(autoregressive_config()),
    )
    batch = batch_with_pads_and_mask_ids()
    terms = loss_terms(objective, model, objective.validation_inputs(batch, SPEC))
    logits_BLV = model(torch.from_numpy(batch.tokens_BL))[:, :-1].clone()
    logits_BLV[..., MASK] = -torch.inf
    targets_BL = torch.from_numpy(batch.tokens_BL[:, 1:])
    log_p = logits_BLV.log_softmax(dim=-1).gather(-1, targets_BL[..., None])[..., 0]
    scored = torch.from_numpy(batch.valid_BL[:, 1:]) & (targets_BL != MASK)
    expected = -torch.where(scored, log_p, 0.0).sum(dim=1)
    torch.testing.assert_close(terms.loss_S, expected, rtol=1e-5, atol=1e-5)


def test_pgm_and_mdlm_validate_on_the_same_masks():
    batch = batch_with_pads_and_mask_ids()
    pgm = build_objective(PGMObjectiveConfig(), VOCABULARY).validation_inputs(batch, SPEC)
    masked = build_objective(MDLMObjectiveConfig(), VOCABULARY).validation_inputs(batch, SPEC)
    np.testing.assert_array_equal(pgm.rows.scored_tokens_S[::2], masked.rows.scored_tokens_S)
    np.testing.assert_array_equal(pgm.rows.weight_S[::2], masked.rows.weight_S)
