"""The Partition Transformer of images: a condition a sequence, and registers (FACTS 2.1)."""

from dataclasses import replace

import pytest
import torch

from pgm_scale.config import MODEL_SIZES, PartitionTransformerConfig, parse
from pgm_scale.models import build_model, segments
from pgm_scale.models.partition_transformer import register_tokens, registers_in_group1
from pgm_scale.models.readout import TokenNLL
from tests.models import oracle
from tests.models.builders import (
    CLASSES,
    LENGTH,
    QUERY_MODES,
    VOCAB,
    assert_no_logit_reads_its_own_group,
    image_config,
    pack_groups,
    randomised,
)

CLASSES_B = torch.tensor([2, CLASSES, 0, 2])  # one of them without a class


def draw_batch():
    """Tokens and groups; BOS, the first token, is in group 0, and one sequence has no code in group 1."""
    generator = torch.Generator().manual_seed(3)
    tokens_BL = torch.randint(VOCAB, (len(CLASSES_B), LENGTH), generator=generator)
    groups_BL = torch.randint(2, tokens_BL.shape, generator=generator)
    groups_BL[:, 0] = 0
    groups_BL[1] = 0
    return tokens_BL, groups_BL


@pytest.mark.parametrize("registers", [0, 2, 4])
@pytest.mark.parametrize("query", QUERY_MODES)
@pytest.mark.parametrize("max_masked_pair_tokens", [0, 32])
def test_packed_training_equals_dense_masks(monkeypatch, registers, query, max_masked_pair_tokens):
    monkeypatch.setattr(segments, "MAX_MASKED_PAIR_TOKENS", max_masked_pair_tokens)
    config = image_config(registers, query)
    model = randomised(config)
    tokens_BL, groups_BL = draw_batch()
    inputs, order = pack_groups(tokens_BL, groups_BL, registers, CLASSES_B, first_query=1)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected_BLV = oracle.partition_transformer(state, config, tokens_BL, groups_BL, CLASSES_B).float()
    torch.testing.assert_close(model(inputs), expected_BLV[order], atol=1e-5, rtol=1e-5)

    targets = tokens_BL[order]
    model(inputs, TokenNLL(targets, None)).mean().backward()
    torch.nn.functional.cross_entropy(expected_BLV[order], targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-5, rtol=1e-5, msg=name)
    used = model.get_parameter("cls_embed.embedding_table.weight").grad.abs().sum(dim=1) > 0
    assert used.tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("query", QUERY_MODES)
def test_a_logit_depends_on_no_code_of_its_group_and_on_the_other_group(query):
    model = randomised(image_config(query=query))
    tokens_BL, groups_BL = draw_batch()

    def logits(tokens_BL):
        inputs, order = pack_groups(tokens_BL, groups_BL, 2, CLASSES_B)
        logits_BLV = torch.empty(*tokens_BL.shape, VOCAB)
        logits_BLV[order] = model(inputs).detach()
        return logits_BLV

    assert_no_logit_reads_its_own_group(logits, tokens_BL, groups_BL)


def test_a_sequence_depends_on_its_own_class_alone():
    model = randomised(image_config())
    tokens_BL, groups_BL = draw_batch()
    inputs, order = pack_groups(tokens_BL, groups_BL, 2, CLASSES_B)
    changed = replace(inputs, classes_B=CLASSES_B.clone())
    changed.classes_B[2] = 4
    same_Q = (model(inputs) == model(changed)).all(-1)
    assert torch.equal(same_Q, order[0] != 2)


def test_half_of_the_registers_is_in_group_1_and_comes_first():
    assert register_tokens(4).tolist() == [-1, -2, -3, -4]
    assert registers_in_group1(4).tolist() == [True, True, False, False]
    assert register_tokens(0).size == registers_in_group1(0).size == 0


def on_meta(size):
    config = parse(PartitionTransformerConfig, MODEL_SIZES[size], [])
    with torch.device("meta"):
        return build_model(config, 16_386, 1025)


@pytest.mark.parametrize(("encoder", "decoder", "tensors"), [(12, 12, 281), (14, 10, 277)])
def test_published_sizes_have_the_published_tensors(encoder, decoder, tensors):
    h, v, c = 1024, 16_386, 1024
    block = 4 * h * h + 2 * (4 * h * h) + 4 * h + h + 6 * h * (c + 1)  # attention, MLP with biases, adaLN
    parts = {
        "vocab_embed": v * h,
        "cls_embed": 1001 * c,
        "encoder": encoder * (block + 2 * h),
        "decoder.group_swap": h + 2 * h + (h * h + h) + (2 * h * h + 2 * h) + (h * h + h),
        "decoder.layers": decoder * (block + 3 * h),
        "output_layer": h + (v * h + v) + 2 * h * (c + 1),
        "reg_tokens": 2 * h,
    }
    parameters = dict(on_meta(f"image-pgm-{encoder}-{decoder}").named_parameters())
    assert len(parameters) == tensors
    for part, expected in parts.items():
        assert sum(p.numel() for name, p in parameters.items() if name.startswith(part + ".")) == expected, (
            part
        )
    assert sum(p.numel() for p in parameters.values()) == sum(parts.values())


def test_published_names_shapes_and_order():
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta("image-pgm-12-12").state_dict().items()}
    names = list(shapes)
    assert names[:2] == ["vocab_embed.embedding", "cls_embed.embedding_table.weight"]
    assert names[-1] == "reg_tokens.weight"
    assert shapes["cls_embed.embedding_table.weight"] == (1001, 1024)
    assert shapes["reg_tokens.weight"] == (2, 1024)
    assert shapes["encoder.blocks.11.adaLN_modulation.weight"] == (6144, 1024)
    assert shapes["decoder.layers.11.adaLN_modulation.weight"] == (6144, 1024)
    assert shapes["output_layer.adaLN_modulation.weight"] == (2048, 1024)
    assert not any(name.startswith("sigma_map") for name in names)


def test_tables_hold_the_registers_positions_too():
    model = on_meta("image-pgm-12-12")
    assert model.rotary_emb.length == model.decoder.group_swap.position_table.length == 1027
    assert model.length == 1025
