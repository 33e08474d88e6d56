"""Parameter counts, names, their order and initial values, as FACTS 1.5 to 1.8 and 9 state them."""

import pytest
import torch

from pgm_scale.config import (
    MODEL_SIZES,
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    PartitionTransformerConfig,
    parse,
)
from pgm_scale.models import build_model
from tests.models.builders import LENGTH, VOCAB, autoregressive_config, diffusion_config, partition_config

GPT2_VOCAB, BERT_VOCAB = 50258, 30522
PARAMETERS = {
    "mdlm-12-768": (169_627_218, 139_292_986),
    "pgm-6-6-768": (171_996_498, 141_662_266),
    "pgm-8-8-768": (202_708_818, 172_374_586),
    "pgm-6-6-1024": (268_092_754, 227_653_690),
    "pgm-8-4-768": (171_994_962, 141_660_730),
    "pgm-10-2-768": (171_993_426, 141_659_194),
    "pgm-4-8-768": (171_998_034, 141_663_802),
    "pgm-10-6-768": (202_707_282, 172_373_050),
    "ar-12-768": (162_246_482, 131_912_250),
    "mdlm-24-1024": (424_477_010, 384_037_946),
    "mdlm-24-1536": (863_158_098, 802_509_370),
}
TENSORS = {"pgm-6-6-768": 151, "pgm-8-8-768": 195, "mdlm-12-768": 130}


def on_meta(size, vocab_size=GPT2_VOCAB):
    config = parse(as_kind(size), MODEL_SIZES[size], [])
    with torch.device("meta"):
        return build_model(config, vocab_size, 1024)


def as_kind(size):
    return {
        "partition_transformer": PartitionTransformerConfig,
        "diffusion_transformer": DiffusionTransformerConfig,
        "autoregressive_transformer": AutoregressiveTransformerConfig,
    }[MODEL_SIZES[size]["kind"]]


# Our own sizes, beyond those that were published: (blocks of either kind, hidden size, parameters).
OWN_SIZES = {
    "pgm-0.2b": (8, 768, 202_708_818),
    "pgm-1.3b": (10, 2048, 1_261_921_618),
    "pgm-7b": (16, 4096, 7_024_895_314),
    "pgm-30b": (24, 7168, 30_791_920_978),
    "pgm-70b": (42, 8192, 69_277_648_210),
}


def counted_by_hand(blocks, h, v, c=128):
    """Parameters of a Partition Transformer, term by term (FACTS 1.5)."""
    block = 12 * h * h + 5 * h + 6 * h * (c + 1)  # q, k, v, output, MLP with biases, adaLN
    norms = 2 * h + 3 * h  # of an encoder and of a decoder block
    group_swap = 4 * h * h + 7 * h
    embedding, time = v * h, 256 * c + c + c * c + c
    output = h + v * h + v + 2 * h * (c + 1)
    return blocks * (2 * block + norms) + group_swap + embedding + time + output


@pytest.mark.parametrize("size", OWN_SIZES)
def test_parameter_counts_of_our_own_sizes(size):
    blocks, hidden, count = OWN_SIZES[size]
    assert sum(p.numel() for p in on_meta(size).parameters()) == count
    assert counted_by_hand(blocks, hidden, GPT2_VOCAB) == count


def test_every_named_size_has_a_count():
    """Those of images have theirs in test_class_conditional, test_maskgit and test_vq."""
    of_images = {name for name in MODEL_SIZES if name.startswith(("image-pgm-", "maskgit-", "vq-"))}
    assert PARAMETERS.keys() | OWN_SIZES.keys() | of_images == MODEL_SIZES.keys()


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size):
    counts = (sum(p.numel() for p in on_meta(size, v).parameters()) for v in (GPT2_VOCAB, BERT_VOCAB))
    assert tuple(counts) == PARAMETERS[size]


@pytest.mark.parametrize("size", TENSORS)
def test_number_of_tensors(size):
    assert len(list(on_meta(size).parameters())) == TENSORS[size]


def linear(name):
    return [f"{name}.weight", f"{name}.bias"]


def self_attention_block(name):
    return [
        *(f"{name}.{part}.weight" for part in ("norm1", "attn_qkv", "attn_out", "norm2")),
        *(key for part in ("mlp.0", "mlp.2", "adaLN_modulation") for key in linear(f"{name}.{part}")),
    ]


HEAD = ["vocab_embed.embedding", *linear("sigma_map.mlp.0"), *linear("sigma_map.mlp.2")]
TAIL = [
    "output_layer.norm_final.weight",
    *linear("output_layer.linear"),
    *linear("output_layer.adaLN_modulation"),
]


@pytest.mark.parametrize(
    ("processor", "processor_names"),
    [("linear", ["query_processor"]), ("mlp4", ["query_processor.0", "query_processor.2"])],
)
def test_partition_transformer_state_has_the_published_names_in_their_order(processor, processor_names):
    swap = "decoder.group_swap"
    expected = HEAD + self_attention_block("encoder.blocks.0") + self_attention_block("encoder.blocks.1")
    expected += [f"{swap}.base_embedding", *linear(f"{swap}.pre_query_norm")]
    for name in (*processor_names, "hidden_to_key_value", "output_linear"):
        expected += linear(f"{swap}.{name}")
    for j in range(2):
        matrices = ("q_norm1", "kv_norm1", "norm2", "attn_q", "attn_kv", "attn_out")
        expected += [f"decoder.layers.{j}.{name}.weight" for name in matrices]
        for name in ("mlp.0", "mlp.2", "adaLN_modulation"):
            expected += linear(f"decoder.layers.{j}.{name}")
    model = build_model(partition_config(processor=processor), VOCAB, LENGTH)
    assert list(model.state_dict()) == expected + TAIL


def test_other_transformers_state_has_the_published_names_in_their_order():
    blocks = self_attention_block("blocks.0") + self_attention_block("blocks.1")
    assert list(build_model(diffusion_config(), VOCAB, LENGTH).state_dict()) == HEAD + blocks + TAIL
    plain = [name for name in ["vocab_embed.embedding", *blocks, *TAIL] if "adaLN" not in name]
    assert list(build_model(autoregressive_config(), VOCAB, LENGTH).state_dict()) == plain


def test_initial_values():
    torch.manual_seed(0)
    config = PartitionTransformerConfig(
        hidden_size=256, num_heads=4, num_encoder_blocks=1, num_decoder_blocks=1
    )
    state = build_model(config, 1000, LENGTH).state_dict()
    for name, tensor in state.items():
        if "adaLN" in name or name.startswith("output_layer.linear"):
            assert (tensor == 0).all(), name
        elif "norm" in name:
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name
        elif name.endswith("base_embedding"):
            assert abs(tensor.std() - 1) < 0.2
            assert tensor.abs().max() > 2
        else:  # uniform in +-1/sqrt(fan_in), the bias too
            weight = state[name.removesuffix("bias") + "weight"] if name.endswith("bias") else tensor
            bound = weight.shape[1] ** -0.5
            assert 0.95 * bound < tensor.abs().max() <= bound, name
            assert abs(tensor.std() * 3**0.5 / bound - 1) < 0.15, name
