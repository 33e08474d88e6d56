"""MDLM, as PGM's, MDLM's and Duo's authors publish it: Lightning.

Keys: `backbone.` and ours, and the buffer `rotary_emb.inv_freq` behind the time MLP (FACTS 1.5, 9): 130 parameters
of 12 blocks. The averaged weights are a list in the same order.
"""

from __future__ import annotations

from pgm_scale.config import DiffusionTransformerConfig, MDLMObjectiveConfig, ModelConfig, SamplerConfig
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


def _describe(shapes: Shapes, hyper_parameters: HyperParameters) -> Contents:
    vocab_size, hidden_size = shape_of(shapes, "vocab_embed.embedding", 2)
    is_time_conditioned = found(hyper_parameters, ("time_conditioning",), bool)
    model = DiffusionTransformerConfig(
        hidden_size=hidden_size,
        num_heads=rotary_heads(shapes, hidden_size),
        num_blocks=numbered(shapes, "blocks."),
        condition_size=shape_of(shapes, "sigma_map.mlp.2.weight", 2)[0],
        dropout=dropout(hyper_parameters),
        time_conditioned=bool(is_time_conditioned),
    )
    return Contents(
        model,
        MDLMObjectiveConfig(),
        SamplerConfig(kind="ancestral_cached"),
        text_vocabulary(vocab_size),
        text_length_tokens(hyper_parameters),
    )


def model_section(description: ModelDescription) -> HyperParameters:
    """`model` of the authors' Hydra configuration."""
    model = description.model
    assert isinstance(model, DiffusionTransformerConfig)
    return {
        "hidden_size": model.hidden_size,
        "n_blocks": model.num_blocks,
        "n_heads": model.num_heads,
        "cond_dim": model.condition_size,
        "length": description.length_tokens,
        "dropout": model.dropout,
        "tie_word_embeddings": False,
    }


def _hyper_parameters(description: ModelDescription) -> HyperParameters:
    model = description.model
    assert isinstance(model, DiffusionTransformerConfig)
    config = {"model": model_section(description), "time_conditioning": model.time_conditioned}
    return {"config": config, "vocab_size": description.vocabulary.size}


def _fits(model: ModelConfig) -> bool:
    return isinstance(model, DiffusionTransformerConfig)


FORMAT = Format(
    name="mdlm",
    layout="lightning",
    prefix=PREFIX,
    marks=("vocab_embed.embedding", "blocks.0.attn_qkv.weight", "sigma_map.mlp.2.weight"),
    not_marks=(),
    describe=_describe,
    fits=_fits,
    hyper_parameters=_hyper_parameters,
    derived=(rotary_key(after="sigma_map.mlp.2.bias"),),
)
