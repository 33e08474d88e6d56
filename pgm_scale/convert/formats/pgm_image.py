"""PGM of ImageNet codes, as published: plain torch files without average or hyper-parameters.

Keys: ours, and the buffer `rotary_emb.inv_freq` behind the token table (FACTS 2.1, 9): 281 parameters
of 12 + 12 blocks.
"""

from __future__ import annotations

from pgm_scale.config import ImagePGMObjectiveConfig, ModelConfig, PartitionTransformerConfig, SamplerConfig
from pgm_scale.convert.checkpoint import HyperParameters
from pgm_scale.convert.formats.base import (
    Contents,
    Format,
    Shapes,
    code_images,
    code_vocabulary,
    rotary_key,
    shape_of,
)
from pgm_scale.convert.formats.pgm_text import partition_config

_LENGTH_TOKENS = 1025  # no tensor tells it: BOS and 32 x 32 codes of VQ-8
_DOWNSAMPLING = 8


def _describe(shapes: Shapes, hyper_parameters: HyperParameters) -> Contents:
    vocab_size, _ = shape_of(shapes, "vocab_embed.embedding", 2)
    class_rows, condition_size = shape_of(shapes, "cls_embed.embedding_table.weight", 2)
    return Contents(
        partition_config(shapes, hyper_parameters, condition_size, class_rows - 1),
        ImagePGMObjectiveConfig(),
        SamplerConfig(kind="halton", steps=32),
        code_vocabulary(vocab_size),
        _LENGTH_TOKENS,
        code_images(_LENGTH_TOKENS, class_rows - 1, _DOWNSAMPLING),
    )


def _fits(model: ModelConfig) -> bool:
    return isinstance(model, PartitionTransformerConfig) and model.num_classes > 0


FORMAT = Format(
    name="pgm-image",
    layout="image",
    prefix="",
    marks=("vocab_embed.embedding", "decoder.group_swap.base_embedding", "cls_embed.embedding_table.weight"),
    not_marks=(),
    describe=_describe,
    fits=_fits,
    hyper_parameters=lambda _: {},
    derived=(rotary_key(after="vocab_embed.embedding"),),
)
