"""The autoregressive baseline of MDLM's and Duo's authors: Lightning.

Keys: `backbone.` and ours, and the buffer `rotary_emb.inv_freq` behind the token table (FACTS 9).
"""

from __future__ import annotations

from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    AutoregressiveTransformerConfig,
    ModelConfig,
    SamplerConfig,
)
from pgm_scale.convert.checkpoint import HyperParameters
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


def _describe(shapes: Shapes, hyper_parameters: HyperParameters) -> Contents:
    vocab_size, hidden_size = shape_of(shapes, "vocab_embed.embedding", 2)
    model = AutoregressiveTransformerConfig(
        hidden_size=hidden_size,
        num_heads=rotary_heads(shapes, hidden_size),
        num_blocks=numbered(shapes, "blocks."),
        dropout=dropout(hyper_parameters),
    )
    return Contents(
        model,
        AutoregressiveObjectiveConfig(),
        SamplerConfig(kind="autoregressive"),
        text_vocabulary(vocab_size),
        text_length_tokens(hyper_parameters),
    )


def _fits(model: ModelConfig) -> bool:
    return isinstance(model, AutoregressiveTransformerConfig)


def _hyper_parameters(description: ModelDescription) -> HyperParameters:
    model = description.model
    assert isinstance(model, AutoregressiveTransformerConfig)
    section = {
        "hidden_size": model.hidden_size,
        "n_blocks": model.num_blocks,
        "n_heads": model.num_heads,
        "length": description.length_tokens,
        "dropout": model.dropout,
        "tie_word_embeddings": False,
    }
    return {"config": {"model": section}, "vocab_size": description.vocabulary.size}


FORMAT = Format(
    name="ar",
    layout="lightning",
    prefix=PREFIX,
    marks=("vocab_embed.embedding", "blocks.0.attn_qkv.weight"),
    not_marks=("sigma_map.mlp.2.weight", "blocks.0.adaLN_modulation.weight"),
    describe=_describe,
    fits=_fits,
    hyper_parameters=_hyper_parameters,
    derived=(rotary_key(after="vocab_embed.embedding"),),
)
