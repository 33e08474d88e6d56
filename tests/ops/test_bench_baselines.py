"""The baselines compute what our models compute, and their samplers draw from the models' laws."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from ops.bench.baselines.autoregressive_transformer import CachedAutoregressiveTransformer
from ops.bench.baselines.diffusion_transformer import DenseDiffusionTransformer
from ops.bench.baselines.optimizer import PerTensorUpdate
from ops.bench.baselines.partition_transformer import DensePartitionTransformer
from ops.bench.baselines.sampler import (
    exponential_race,
    sample_autoregressive,
    sample_mdlm_cached,
    sample_pgm_uniform,
)
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.readout import TokenNLL
from pgm_scale.models.segments import Segments
from tests.models.builders import (
    LENGTH,
    QUERY_MODES,
    VOCAB,
    autoregressive_config,
    diffusion_config,
    pack_groups,
    partition_config,
    randomised,
)
from tests.sampling.chi_square import p_value
from tests.sampling.exact import (
    BOS,
    MASK,
    ExactDiffusion,
    ExactPartition,
    ancestral_law,
    joint_distribution,
)
from tests.sampling.exact import LENGTH as EXACT_LENGTH

BATCH, LAST = 4, VOCAB - 1
JOINT = joint_distribution()
ROWS = 6000


def tokens_and_groups():
    generator = torch.Generator().manual_seed(3)
    tokens_BL = torch.randint(LAST, (BATCH, LENGTH), generator=generator)
    in_group1_BL = torch.rand(BATCH, LENGTH, generator=generator) < 0.5
    return tokens_BL, in_group1_BL


@pytest.mark.parametrize("query", QUERY_MODES)
@pytest.mark.parametrize("processor", ["linear", "mlp4"])
def test_dense_partition_transformer_has_our_logits_loss_and_gradients(query, processor):
    ours = randomised(partition_config(query, processor))
    dense = DensePartitionTransformer.from_state(ours.state_dict(), ours.config, LENGTH)
    tokens_BL, in_group1_BL = tokens_and_groups()
    inputs, order = pack_groups(tokens_BL, in_group1_BL.long())
    torch.testing.assert_close(dense(tokens_BL, in_group1_BL)[order], ours(inputs), atol=1e-4, rtol=0)

    weight_BL = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(4))
    nll_Q = ours(inputs, TokenNLL(tokens_BL[order], LAST))
    loss = (weight_BL[order] * nll_Q).mean()
    dense_loss = dense.training_loss(tokens_BL, in_group1_BL, weight_BL, LAST)
    torch.testing.assert_close(dense_loss, loss, atol=0, rtol=1e-5)
    loss.backward()
    dense_loss.backward()
    gradients = dict(dense.named_parameters())
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        difference = (gradients[name].grad - parameter.grad).norm()
        assert difference <= 1e-4 * parameter.grad.norm(), (name, float(difference))


@pytest.mark.parametrize("query", QUERY_MODES)
def test_dense_inference_reads_the_real_tokens_of_padded_rows_only(query):
    ours = randomised(partition_config(query))
    dense = DensePartitionTransformer.from_state(ours.state_dict(), ours.config, LENGTH)
    generator = torch.Generator().manual_seed(5)
    order_BL = torch.rand(BATCH, LENGTH, generator=generator).argsort(dim=1)
    tokens_BT = torch.randint(LAST, (BATCH, 6), generator=generator)
    lengths_B, positions_BT, queries_BQ = torch.tensor([6, 1, 4, 3]), order_BL[:, :6], order_BL[:, 6:9]
    rows = range(BATCH)
    packed = PartitionInputs(
        torch.cat([tokens_BT[b, : lengths_B[b]] for b in rows]),
        torch.cat([positions_BT[b, : lengths_B[b]] for b in rows]),
        Segments.of(lengths_B.tolist()),
        queries_BQ.flatten(),
        Segments.of([3] * BATCH),
    )
    logits_BQV = dense.infer(tokens_BT, positions_BT, lengths_B, queries_BQ)
    torch.testing.assert_close(logits_BQV.flatten(0, 1), ours(packed), atol=1e-4, rtol=0)


def test_dense_diffusion_transformer_has_our_logits():
    ours = randomised(diffusion_config())
    dense = DenseDiffusionTransformer.from_state(ours.state_dict(), ours.config, LENGTH)
    tokens_BL, _ = tokens_and_groups()
    torch.testing.assert_close(dense(tokens_BL), ours(tokens_BL), atol=1e-4, rtol=0)


def test_cached_autoregressive_transformer_has_our_logits():
    ours = randomised(autoregressive_config())
    cached = CachedAutoregressiveTransformer.from_state(ours.state_dict(), ours.config, LENGTH)
    tokens_BL, _ = tokens_and_groups()
    logits_BLV, cache = [], None
    for start, end in itertools.pairwise([0, *range(4, LENGTH + 1)]):
        logits_BnV, cache = cached(tokens_BL[:, start:end], cache)
        logits_BLV.append(logits_BnV)
    torch.testing.assert_close(torch.cat(logits_BLV, dim=1), ours(tokens_BL), atol=1e-4, rtol=0)


def test_dropout_falls_on_both_updates_of_every_block_and_nowhere_else():
    """At a rate of 1 a block adds nothing, as it does behind gates of 0."""
    ours: Any = randomised(partition_config())
    config = partition_config(dropout=1.0)
    dense = DensePartitionTransformer.from_state(ours.state_dict(), config, LENGTH)
    for block in [*ours.encoder.blocks, *ours.decoder.layers]:
        for parameter in block.adaLN_modulation.parameters():
            torch.nn.init.zeros_(parameter)
    tokens_BL, in_group1_BL = tokens_and_groups()
    inputs, order = pack_groups(tokens_BL, in_group1_BL.long())
    torch.testing.assert_close(dense(tokens_BL, in_group1_BL)[order], ours(inputs), atol=1e-4, rtol=0)


def law_p_value(tokens_BL, law):
    assert (tokens_BL[:, 0] == BOS).all()
    return p_value(np.bincount(tokens_BL[:, 1:].numpy() @ [9, 3, 1], minlength=27), law)


class ExactPublished(torch.nn.Module):
    """The exact conditionals behind the baselines' interfaces; its state is what `vocab_embed` holds."""

    def __init__(self):
        super().__init__()
        self.vocab_embed = torch.nn.Module()
        self.vocab_embed.embedding = torch.nn.Parameter(torch.zeros(1))
        self.partition, self.diffusion = ExactPartition(JOINT), ExactDiffusion(JOINT)

    def infer(self, tokens_BT, positions_BT, lengths_B, query_positions_BQ):
        packed = PartitionInputs(
            tokens_BT.flatten(),
            positions_BT.flatten(),
            Segments.of(lengths_B.tolist()),
            query_positions_BQ.flatten(),
            Segments.of([query_positions_BQ.shape[1]] * len(tokens_BT)),
        )
        return self.partition(packed).unflatten(0, query_positions_BQ.shape)

    def forward(self, tokens_BL):
        return self.diffusion(tokens_BL)


def exact_model() -> Any:
    return ExactPublished()


def test_uniform_sampler_with_one_token_a_step_draws_from_the_joint():
    generator = torch.Generator().manual_seed(6)
    tokens_BL = sample_pgm_uniform(exact_model(), ROWS, EXACT_LENGTH, EXACT_LENGTH, BOS, MASK, generator)
    assert law_p_value(tokens_BL, JOINT.ravel()) > 1e-4


@pytest.mark.parametrize("steps", [1, 3])
def test_cached_ancestral_sampler_draws_from_the_ancestral_law(steps):
    generator = torch.Generator().manual_seed(7)
    tokens_BL, passes = sample_mdlm_cached(exact_model(), ROWS, EXACT_LENGTH, steps, BOS, MASK, generator)
    assert passes == steps + 1
    assert law_p_value(tokens_BL, ancestral_law(JOINT, (BOS, MASK, MASK, MASK), steps)) > 1e-4


def test_cached_ancestral_sampler_skips_the_forward_passes_that_nothing_has_changed_for():
    generator = torch.Generator().manual_seed(8)
    _, passes = sample_mdlm_cached(exact_model(), 2, EXACT_LENGTH, 500, BOS, MASK, generator)
    assert 2 <= passes <= 1 + 2 * (EXACT_LENGTH - 1)


def test_autoregressive_sampler_draws_from_the_model():
    """The law of two tokens after BOS, from the model's own probabilities of all continuations."""
    model = randomised(autoregressive_config())
    cached = CachedAutoregressiveTransformer.from_state(model.state_dict(), model.config, LENGTH)
    drawn_B3 = sample_autoregressive(cached, 20000, 3, 0, LAST, torch.Generator().manual_seed(9))
    rows_R3 = torch.tensor([(0, a, b) for a in range(LAST) for b in range(LAST)])
    with torch.no_grad():
        log_p_RLV = model(rows_R3)[..., :LAST].double().log_softmax(dim=-1)
    law = sum(log_p_RLV[torch.arange(len(rows_R3)), i, rows_R3[:, i + 1]] for i in (0, 1)).exp()
    counts = np.bincount((drawn_B3[:, 1:] @ torch.tensor([LAST, 1])).numpy(), minlength=LAST**2)
    assert p_value(counts, law.numpy()) > 1e-4


def test_exponential_race_draws_every_token_with_its_probability():
    shares = np.array([0.6, 0.3, 0.0999, 1e-4, 0.0])
    log_p_QV = torch.from_numpy(shares).float().log().expand(200_000, -1)
    drawn_Q = exponential_race(log_p_QV, torch.Generator().manual_seed(10))
    assert p_value(np.bincount(drawn_Q.numpy(), minlength=5), shares / shares.sum()) > 1e-4


def test_per_tensor_update_is_clip_adamw_and_ema():
    """Three updates against the formulas in float64; the gradients are larger than the clip."""
    generator = torch.Generator().manual_seed(11)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((3, 4), (5,))]
    rate, betas, epsilon, decay, max_norm = 0.01, (0.9, 0.95), 1e-8, 0.1, 1.0
    update = PerTensorUpdate(parameters, rate, betas, epsilon, decay, max_norm, ema_decay=0.3)
    expected = torch.cat([p.detach().flatten() for p in parameters]).double()
    average, m, v = expected.clone(), torch.zeros_like(expected), torch.zeros_like(expected)
    for n in (1, 2, 3):
        gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        update.step()
        g = torch.cat([gradient.flatten() for gradient in gradients]).double()
        assert g.norm() > max_norm
        g = g * max_norm / g.norm()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        corrected = (m / (1 - betas[0] ** n)) / ((v / (1 - betas[1] ** n)).sqrt() + epsilon)
        expected = expected * (1 - rate * decay) - rate * corrected
        ema_decay = min(0.3, (1 + n) / (10 + n))
        average = ema_decay * average + (1 - ema_decay) * expected
    for actual, wanted in ((parameters, expected), (update.average, average)):
        flat = torch.cat([x.detach().flatten() for x in actual]).double()
        torch.testing.assert_close(flat, wanted, atol=1e-6, rtol=1e-6)
