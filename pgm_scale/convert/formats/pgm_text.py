"""PGM of text, as published: Lightning, also the distilled ones, whose hyper-parameters are laid out otherwise.

Keys: `backbone.` and ours, and the buffer `rotary_emb.inv_freq` behind the token table (FACTS 1.5, 9): 151
parameters of 6 + 6 blocks, 195 of 8 + 8. The averaged weights are a list in the same order.
"""

from __future__ import annotations

from pgm_scale.config import ModelConfig, PartitionTransformerConfig, PGMObjectiveConfig, SamplerConfig
from pgm_scale.convert.checkpoint import HyperParameters, found
from pgm_scale.convert.formats.base import (
    PREFIX,
    Contents,
    Format,
    Shapes,
    dropout,
    numbered,
    rotary_heads,
    rotary_key,
    shape_of,
    text_length_tokens,
    text_vocabulary,
)
from pgm_scale.trained_model import ModelDescription

QUERY_NAMES = ("pre_query_mode", "group_swap_query", "query_mode")


def partition_config(
    shapes: Shapes, hyper_parameters: HyperParameters, condition_size: int, num_classes: int = 0
) -> PartitionTransformerConfig:
    """Sizes by shapes. How GroupSwap's queries start has no shape: `learn+freqs`, as of all published models."""
    _, hidden_size = shape_of(shapes, "vocab_embed.embedding", 2)
    has_mlp = "decoder.group_swap.query_processor.0.weight" in shapes
    return PartitionTransformerConfig(
        hidden_size=hidden_size,
        num_heads=rotary_heads(shapes, hidden_size),
        num_encoder_blocks=numbered(shapes, "encoder.blocks."),
        num_decoder_blocks=numbered(shapes, "decoder.layers."),
        condition_size=condition_size,
        dropout=dropout(hyper_parameters),
        group_swap_query=found(hyper_parameters, QUERY_NAMES, str) or "learn+freqs",
        group_swap_processor="mlp4" if has_mlp else "linear",
        num_classes=num_classes,
        registers=shape_of(shapes, "reg_tokens.weight", 2)[0] if "reg_tokens.weight" in shapes else 0,
    )


def _describe(shapes: Shapes, hyper_parameters: HyperParameters) -> Contents:
    vocab_size, _ = shape_of(shapes, "vocab_embed.embedding", 2)
    condition_size, _ = shape_of(shapes, "sigma_map.mlp.2.weight", 2)
    return Contents(
        partition_config(shapes, hyper_parameters, condition_size),
        PGMObjectiveConfig(form="published"),
        SamplerConfig(),
        text_vocabulary(vocab_size),
        text_length_tokens(hyper_parameters),
    )


def _fits(model: ModelConfig) -> bool:
    return isinstance(model, PartitionTransformerConfig) and not model.num_classes


def _hyper_parameters(description: ModelDescription) -> HyperParameters:
    model = description.model
    assert isinstance(model, PartitionTransformerConfig)
    section = {
        "hidden_size": model.hidden_size,
        "n_heads": model.num_heads,
        "n_encoder_blocks": model.num_encoder_blocks,
        "n_decoder_blocks": model.num_decoder_blocks,
        "cond_dim": model.condition_size,
        "length": description.length_tokens,
        "dropout": model.dropout,
        "pre_query_mode": model.group_swap_query,
    }
    return {"config": {"model": section}, "vocab_size": description.vocabulary.size}


FORMAT = Format(
    name="pgm-text",
    layout="lightning",
    prefix=PREFIX,
    marks=("vocab_embed.embedding", "decoder.group_swap.base_embedding", "sigma_map.mlp.2.weight"),
    not_marks=(),
    describe=_describe,
    fits=_fits,
    hyper_parameters=_hyper_parameters,
    derived=(rotary_key(after="vocab_embed.embedding"),),
)
