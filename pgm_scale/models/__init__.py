"""Models as single-device maths; whoever builds one may inject other linears (`layers.LayerBuilder`).

Shape suffixes of tensor names, used in the whole package:

    B  sequences                T  packed tokens (keys)      H  hidden size       V  vocabulary
    L  length of a sequence     Q  packed query tokens       N  heads             S  segments
    n  tokens of this call      D  head size                 c  condition size

`q_TND` is a `[T, N, D]` tensor; `offsets_S1` is `[S + 1]`.
"""

from __future__ import annotations

from torch import nn

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    ModelConfig,
    PartitionTransformerConfig,
    VQModelConfig,
)
from pgm_scale.models.autoregressive import AutoregressiveTransformer
from pgm_scale.models.dit import DiffusionTransformer
from pgm_scale.models.layers import LOCAL_LAYERS, LayerBuilder
from pgm_scale.models.maskgit import MaskGITTransformer
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.models.stages import Span
from pgm_scale.models.vq import VQModel


def build_model(
    config: ModelConfig,
    vocab_size: int,
    length: int,
    layers: LayerBuilder = LOCAL_LAYERS,
    span: Span | None = None,
) -> nn.Module:
    """The model of a config, freshly initialised from the global torch generator.

    Args:
        config: which model and how large.
        vocab_size: tokens, the mask included.
        length: longest sequence, which sizes the position tables. A VQ model takes neither from the data.
        layers: makes the linears; plain torch ones by default.
        span: the units that a pipeline stage holds; all by default.
    """
    match config:
        case PartitionTransformerConfig():
            return PartitionTransformer(config, vocab_size, length, layers, span)
        case DiffusionTransformerConfig():
            return DiffusionTransformer(config, vocab_size, length, layers, span)
        case AutoregressiveTransformerConfig():
            return AutoregressiveTransformer(config, vocab_size, length, layers, span)
        case MaskGITTransformerConfig():
            return MaskGITTransformer(config, vocab_size, length, layers, span)
        case VQModelConfig():
            return VQModel(config)
