import pytest
import torch

from pgm_scale.models import build_model, segments
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.readout import TokenNLL
from pgm_scale.models.segments import Segments
from tests.models import oracle
from tests.models.builders import (
    LENGTH,
    QUERY_MODES,
    VOCAB,
    assert_no_logit_reads_its_own_group,
    pack_groups,
    partition_config,
    randomised,
)

PROCESSORS = ("linear", "mlp4")


def draw_batch(empty_groups=True):
    generator = torch.Generator().manual_seed(3)
    tokens_BL = torch.randint(VOCAB, (4, LENGTH), generator=generator)
    groups_BL = torch.randint(2, (4, LENGTH), generator=generator)
    if empty_groups:
        groups_BL[1], groups_BL[2] = 0, 1
    return tokens_BL, groups_BL


@pytest.mark.parametrize("query", QUERY_MODES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("empty_groups", [True, False])
@pytest.mark.parametrize("max_masked_pair_tokens", [0, LENGTH])
def test_packed_training_equals_dense_masks(
    monkeypatch, query, processor, empty_groups, max_masked_pair_tokens
):
    monkeypatch.setattr(segments, "MAX_MASKED_PAIR_TOKENS", max_masked_pair_tokens)
    config = partition_config(query, processor)
    model = randomised(config)
    tokens_BL, groups_BL = draw_batch(empty_groups)
    inputs, order = pack_groups(tokens_BL, groups_BL)
    logits_QV = model(inputs)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected_BLV = oracle.partition_transformer(state, config, tokens_BL, groups_BL).float()
    torch.testing.assert_close(logits_QV, expected_BLV[order], atol=1e-5, rtol=1e-5)

    targets = tokens_BL[order]
    model(inputs, TokenNLL(targets, None)).mean().backward()
    torch.nn.functional.cross_entropy(expected_BLV.flatten(0, 1), tokens_BL.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("query", QUERY_MODES)
@pytest.mark.parametrize("max_masked_pair_tokens", [0, LENGTH])
def test_a_logit_depends_on_no_token_of_its_group_and_on_the_other_group(
    monkeypatch, query, max_masked_pair_tokens
):
    monkeypatch.setattr(segments, "MAX_MASKED_PAIR_TOKENS", max_masked_pair_tokens)
    model = randomised(partition_config(query))
    tokens_BL, groups_BL = draw_batch(empty_groups=False)

    def logits(tokens_BL):
        inputs, order = pack_groups(tokens_BL, groups_BL)
        logits_BLV = torch.empty(*tokens_BL.shape, VOCAB)
        logits_BLV[order] = model(inputs).detach()
        return logits_BLV

    assert_no_logit_reads_its_own_group(logits, tokens_BL, groups_BL)


def test_inference_layout_equals_training_layout_at_the_target_positions():
    """Clean tokens are one group; the positions asked for are any part of the other one, in any order."""
    model = randomised(partition_config("learn+freqs+mean"))
    tokens_BL, groups_BL = draw_batch()
    groups_BL[2, 0] = 0  # BOS is always clean
    training, order = pack_groups(tokens_BL, groups_BL)
    logits_BLV = torch.empty(*tokens_BL.shape, VOCAB)
    logits_BLV[order] = model(training).detach()

    clean = [torch.nonzero(groups == 0)[:, 0].flip(0) for groups in groups_BL]
    targets = [torch.nonzero(groups == 1)[:, 0][: b + 2] for b, groups in enumerate(groups_BL)]
    inference = PartitionInputs(
        torch.cat([tokens_BL[b, positions] for b, positions in enumerate(clean)]),
        torch.cat(clean),
        Segments.of(len(positions) for positions in clean),
        torch.cat(targets),
        Segments.of(len(positions) for positions in targets),
    )
    expected_QV = torch.cat([logits_BLV[b, positions] for b, positions in enumerate(targets)])
    torch.testing.assert_close(model(inference), expected_QV, atol=1e-5, rtol=1e-5)


def test_an_untrained_model_gives_zero_logits_and_passes_embeddings_through_its_encoder():
    torch.manual_seed(0)
    model = build_model(partition_config(), VOCAB, LENGTH)
    inputs, _ = pack_groups(*draw_batch())
    assert (model(inputs) == 0).all()
    embedded = []
    model.get_submodule("encoder").register_forward_hook(
        lambda _, arguments, output: embedded.extend([arguments[0], output])
    )
    model(inputs)
    assert torch.equal(*embedded)


def test_dropout_follows_the_global_generator_and_stops_in_evaluation():
    model = randomised(partition_config(dropout=0.5))
    inputs, _ = pack_groups(*draw_batch())

    def seeded(seed):
        torch.manual_seed(seed)
        return model(inputs)

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    model.eval()
    assert torch.equal(seeded(1), seeded(2))


def test_bf16_weights_keep_fp32_tables_and_logits():
    model = randomised(partition_config("learn+freqs+logsumexp"))
    inputs, _ = pack_groups(*draw_batch())
    exact = model(inputs)
    rounded = model.bfloat16()(inputs)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert rounded.dtype == torch.float32
    assert (rounded - exact).square().mean() < 1e-3 * exact.square().mean()


def test_a_model_made_without_memory_has_its_tables_once_it_is_given_some():
    with torch.device("meta"):
        model = build_model(partition_config(), VOCAB, LENGTH)
    whole = randomised(partition_config())
    model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict(), strict=True)
    inputs, _ = pack_groups(*draw_batch())
    assert torch.equal(model(inputs), whole(inputs))


def test_every_parameter_has_a_gradient_when_no_token_has_a_partner():
    model = randomised(partition_config("learn+freqs+mean"))
    inputs, _ = pack_groups(draw_batch()[0][:1], torch.zeros(1, LENGTH, dtype=torch.long))
    model(inputs).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
    )
    assert (model.decoder.layers[0].attn_q.weight.grad == 0).all()
