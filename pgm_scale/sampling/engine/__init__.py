"""The fast path of sampling: models with their constants folded, and samplers that compute what a step changes.

A model is folded once a call of `sample`. What comes out answers like the model (logits within 1e-4 in fp32, by
test), so every sampler takes either; two samplers have a form of their own for folded models, which keeps what does
not change between steps. The plain models and samplers stay as they are: they are what this package must equal, and
what runs under tensor or pipeline parallelism, ZeRO-3, autocast, time conditioning, with int8 weights, and for
autoregressive models.

The cost is memory for a second copy of the blocks' weights while sampling (on a CPU, of all weights).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pgm_scale.models.dit import DiffusionTransformer
from pgm_scale.models.int8 import is_quantized
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.models.stages import whole_span
from pgm_scale.models.vocabulary import VocabularyLinear
from pgm_scale.sampling.ancestral import sample_ancestral_cached
from pgm_scale.sampling.batch import Sampler, SamplingBatch
from pgm_scale.sampling.engine.cached_ancestral import CachedAncestralSampler
from pgm_scale.sampling.engine.diffusion import FoldedDiffusionTransformer
from pgm_scale.sampling.engine.partition import FoldedPartitionTransformer
from pgm_scale.sampling.engine.uniform import UniformSampler
from pgm_scale.sampling.pgm_uniform import sample_uniform

BatchSampler = Callable[[SamplingBatch], tuple[Tensor, int]]


def batch_sampler(sampler: Sampler, model: nn.Module) -> BatchSampler:
    """The sampler of this model, as fast as they allow; the model must not change while it is used."""
    folded = fold(model)
    if sampler is sample_uniform and isinstance(folded, FoldedPartitionTransformer):
        return UniformSampler(folded)
    if sampler is sample_ancestral_cached and isinstance(folded, FoldedDiffusionTransformer):
        return CachedAncestralSampler(folded)
    return partial(sampler, folded)


def fold(model: Any) -> Any:
    """The folded form of a model that one device holds and evaluates, or the model itself.

    Nor is a model folded that is called in a way of its own: one in training, whose engine hears of each forward
    pass by a hook, may wrap it in autocast, and has not planned for a second copy of the weights; nor one that is
    conditioned on classes, whose adaLN vectors are no constants.
    """
    if type(model) not in (PartitionTransformer, DiffusionTransformer) or not _is_whole(model):
        return model
    if isinstance(model, PartitionTransformer):
        is_constant = not (model.config.num_classes or model.config.registers)
        has_blocks = len(model.encoder.blocks) and len(model.decoder.layers)
        return FoldedPartitionTransformer(model) if has_blocks and is_constant else model
    if model.config.time_conditioned or len(model.blocks) < 2:
        return model
    return FoldedDiffusionTransformer(model)


def _is_whole(model: Any) -> bool:
    """Whether all weights are here, in plain linears, used in their own dtype and by plain calls."""
    return (
        model.span == whole_span(model.config)
        and type(model.output_layer.linear) is VocabularyLinear
        and not is_quantized(model)
        and all(parameter.numel() for parameter in model.parameters())
        and not torch.is_autocast_enabled(model.output_layer.linear.weight.device.type)
        and not model._forward_pre_hooks
        and "forward" not in vars(model)
    )
