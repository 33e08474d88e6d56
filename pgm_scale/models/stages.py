"""A model as a row of units, of which every pipeline stage holds a span.

The units of the Partition Transformer are: embedding, encoder blocks, GroupSwap, decoder blocks, output. Those
of the other transformers: embedding, blocks, output; a VQ model is one unit. What passes from one stage to the next
is a stream of `[T, H]`; from GroupSwap to the last decoder block it is two of them in one tensor `[Q + T, H]`, the
decoder's and the finished one of the encoder. A model's `rows_before(unit, *arguments)` tells the receiver how many
rows there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import nn

from pgm_scale.config import (
    MaskGITTransformerConfig,
    ModelConfig,
    PartitionTransformerConfig,
    TransformerConfig,
    VQModelConfig,
)


@dataclass(frozen=True)
class Span:
    """The units first, first + 1, ..., last - 1 of a model."""

    first: int
    last: int

    def __contains__(self, unit: int) -> bool:
        return self.first <= unit < self.last

    def numbers(self, first_unit: int, count: int) -> range:
        """Which of the blocks 0 to `count` - 1, whose first one is unit `first_unit`, are in the span."""
        return range(max(self.first - first_unit, 0), max(0, min(self.last - first_unit, count)))


def unit_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kind of each unit of a model, in order; units of one kind cost the same."""
    if isinstance(config, PartitionTransformerConfig):
        encoder = ("encoder_block",) * config.num_encoder_blocks
        decoder = ("decoder_block",) * config.num_decoder_blocks
        return ("embedding", *encoder, "group_swap", *decoder, "output")
    if isinstance(config, VQModelConfig):
        return ("autoencoder",)
    return ("embedding", *("block",) * config.num_blocks, "output")


def stream_rows(config: TransformerConfig, kind: str, length: int) -> int:
    """Rows of H that pass into a unit of this kind, for a sequence of `length` tokens of data."""
    match config:
        case PartitionTransformerConfig():
            keys = length + config.registers
            queries = length - 1 if config.num_classes else length  # of images, BOS is not predicted
            return {"decoder_block": queries + keys, "output": queries}.get(kind, keys)
        case MaskGITTransformerConfig():
            return length - 1 + config.registers
        case _:
            return length


def whole_span(config: ModelConfig) -> Span:
    return Span(0, len(unit_kinds(config)))


def spans(stage_units: Iterable[int]) -> list[Span]:
    """The span of each stage, from how many units each one has."""
    return [Span(first, last) for first, last in pairwise([0, *accumulate(stage_units)])]


def is_shared(parameter_name: str) -> bool:
    """Whether every stage has this parameter.

    It is one of the condition, the time's or the class's, which all modulations read; or the token table of
    MaskGIT, which both ends read: the stages between them hold it too, as all of them join in a sum of gradients.
    """
    return parameter_name.startswith(("sigma_map.", "cls_embed.", "cls_emb.", "tok_emb."))


def numbered(blocks: dict[int, nn.Module]) -> nn.ModuleList:
    """A list of those blocks of a model that this stage has, under their numbers in the whole model."""
    modules = nn.ModuleList()
    for number, block in blocks.items():
        modules.add_module(str(number), block)
    return modules
