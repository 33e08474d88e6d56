"""The Partition Transformer (PGM paper, section 4; FACTS 1): encode a group alone, predict it from the other.

Encoder blocks attend within a group; GroupSwap makes a new stream out of positions and the other group's
keys; decoder blocks keep reading the other group's final encoding. So the logits of a position depend on no
token of its own group. Training and inference share one packed layout, `PartitionInputs`.

The model of images (FACTS 2.1) is conditioned on a class instead of the constant time, and has R registers:
learned tokens in front of the data, R/2 in each group, which take the positions 0 to R - 1 and move the data's by
R. Register r is the token -1 - r; `register_tokens` and `registers_in_group1` are what a layout puts in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pgm_scale.config import PartitionTransformerConfig
from pgm_scale.models.blocks import (
    MLP_RATIO,
    Attend,
    CrossAttentionBlock,
    OutputLayer,
    Rotary,
    SelfAttentionBlock,
    split_heads,
)
from pgm_scale.models.initialization import fill_with, initialise, normal, normal_of, ones, zeros
from pgm_scale.models.layers import (
    LOCAL_LAYERS,
    ClassEmbedding,
    LayerBuilder,
    PositionTable,
    RotaryTable,
    TimeEmbedding,
    rotate,
)
from pgm_scale.models.readout import Readout, logits
from pgm_scale.models.segments import Segments, segment_attention
from pgm_scale.models.stages import Span, numbered, whole_span

REGISTER_DEVIATION = 0.02  # of the registers' initial values


@dataclass(frozen=True)
class PartitionInputs:
    """Packed tokens and the positions to predict; query segment j is predicted from key segment j alone.

    Training: tokens sorted by (sequence, group), key segments (b0 g0), (b0 g1), (b1 g0), ...; query segments
    are the two groups of each sequence swapped, (b0 g1), (b0 g0), (b1 g1), ..., hence Q = T = B * L whatever
    the partition. Inference: a row's clean tokens are its key segment, the positions to predict its query
    segment. Any segment may be empty.

    A class-conditional model needs each sequence to have as many tokens, T / B, and as many queries, Q / B. In
    training on images, only codes are predicted: T = B * (R + L), and Q = B * (L - 1) without registers and BOS.

    Attributes:
        tokens_T: int64 token ids; -1 - r is register r.
        positions_T: int64 positions of the tokens, 0 to R + L - 1.
        segments: the key segments over T.
        query_positions_Q: int64 positions to predict.
        query_segments: the query segments over Q, as many as there are key segments.
        classes_B: int64 class of each sequence, `num_classes` for none; None for models without classes.
    """

    tokens_T: Tensor
    positions_T: Tensor
    segments: Segments
    query_positions_Q: Tensor
    query_segments: Segments
    classes_B: Tensor | None = None

    def to(self, device: torch.device | str) -> PartitionInputs:
        return PartitionInputs(
            self.tokens_T.to(device, non_blocking=True),
            self.positions_T.to(device, non_blocking=True),
            self.segments.to(device),
            self.query_positions_Q.to(device, non_blocking=True),
            self.query_segments.to(device),
            None if self.classes_B is None else self.classes_B.to(device, non_blocking=True),
        )


def register_tokens(registers: int) -> np.ndarray:
    """int64 [R]: the token ids of the registers, in the order of their positions, 0 to R - 1."""
    return -1 - np.arange(registers)


def registers_in_group1(registers: int) -> np.ndarray:
    """bool [R]: whether each register is in group 1, as the first half is; inference keeps those of group 0."""
    return np.arange(registers) < registers // 2


class PartitionTransformer(nn.Module):
    """Names and initial values of the published model (FACTS 1.5, 1.6); no position tables in the state.

    A pipeline stage holds a `span` of its units (`models.stages`); the parts of other stages are None or empty.
    """

    def __init__(
        self,
        config: PartitionTransformerConfig,
        vocab_size: int,
        length: int,
        layers: LayerBuilder = LOCAL_LAYERS,
        span: Span | None = None,
    ):
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.span = span = span or whole_span(config)
        self.group_swap_unit = 1 + config.num_encoder_blocks
        self.output_unit = self.group_swap_unit + config.num_decoder_blocks + 1
        hidden, condition = config.hidden_size, config.condition_size
        self.vocab_embed = layers.vocab_embedding(vocab_size, hidden) if 0 in span else None
        self.rotary_emb = RotaryTable(config.registers + length, hidden // config.num_heads)
        # Either is on every stage, because all of them need the condition.
        self.cls_embed = ClassEmbedding(config.num_classes, condition, layers) if config.num_classes else None
        self.sigma_map = None if config.num_classes else TimeEmbedding(condition, layers)
        self.encoder = Encoder(config, layers, span.numbers(1, config.num_encoder_blocks))
        self.decoder = Decoder(
            config,
            config.registers + length,
            layers,
            span.numbers(self.group_swap_unit + 1, config.num_decoder_blocks),
            has_group_swap=self.group_swap_unit in span,
        )
        self.output_layer = (
            OutputLayer(hidden, vocab_size, condition, layers) if self.output_unit in span else None
        )
        self.reg_tokens = nn.Embedding(config.registers, hidden) if config.registers and 0 in span else None
        if self.reg_tokens is not None:
            initialise(self.reg_tokens.weight, normal_of(REGISTER_DEVIATION))
        self.own_tokens = layers.own_tokens

    def forward(
        self, inputs: PartitionInputs, readout: Readout = logits, received: Tensor | None = None
    ) -> Any:
        """The readout of the query positions; by default fp32 logits `[Q, V]`.

        A stage that starts inside the model takes the streams that it has `received`, and one that ends inside
        returns its own: see `models.stages`.
        """
        x = received if self.vocab_embed is None else self._embedded(inputs.tokens_T)
        assert x is not None, "a stage without the embedding needs what the stage before it sends"
        condition = self._condition(inputs, x)
        rotaries = Rotaries(
            queries=self.rotary_emb(inputs.query_positions_Q, x.dtype),
            keys=self.rotary_emb(inputs.positions_T, x.dtype),
        )
        if self.span.first <= self.group_swap_unit:
            encoded_TH = self.encoder(x, inputs.segments, rotaries.keys, condition)
            if self.decoder.group_swap is None:
                return encoded_TH
            decoded_QH = self.decoder.group_swap(encoded_TH, inputs, rotaries)
        else:
            queries = self._decoder_rows(x.shape[0], inputs)
            decoded_QH, encoded_TH = x[:queries], x[queries:]
        decoded_QH = self.decoder(decoded_QH, encoded_TH, inputs, rotaries, condition)
        if self.output_layer is not None:
            return self.output_layer(decoded_QH, condition, readout)
        return decoded_QH if self.span.last == self.output_unit else torch.cat([decoded_QH, encoded_TH])

    def _embedded(self, tokens_T: Tensor) -> Tensor:
        """`[T, H]`: rows of the token table, and the registers."""
        assert self.vocab_embed is not None
        if self.reg_tokens is None:
            return self.vocab_embed(tokens_T)
        embedded_TH = self.vocab_embed(tokens_T.clamp(min=0))
        own_T = self.own_tokens(tokens_T)
        registers_TH = self.reg_tokens((-1 - own_T).clamp(min=0))
        return torch.where(own_T[:, None] < 0, registers_TH, embedded_TH)

    def _condition(self, inputs: PartitionInputs, x: Tensor) -> Tensor:
        """`[c]`, one for all, or `[B, 1, c]` of the classes."""
        if self.cls_embed is None:
            assert self.sigma_map is not None
            return self.sigma_map(x.new_zeros(()), x.dtype)
        assert inputs.classes_B is not None, "a class-conditional model needs the class of each sequence"
        return self.cls_embed(inputs.classes_B, x.dtype)

    def rows_before(self, unit: int, inputs: PartitionInputs) -> int:
        """Rows of H that pass into a unit from the one before it."""
        queries, keys = inputs.query_positions_Q.numel(), inputs.tokens_T.numel()
        if unit <= self.group_swap_unit:
            return keys
        return queries if unit == self.output_unit else queries + keys

    def _decoder_rows(self, rows: int, inputs: PartitionInputs) -> int:
        """How many of the received rows are the decoder's; a rank may have received only its own tokens."""
        all_rows = self.rows_before(self.span.first, inputs)
        return inputs.query_positions_Q.numel() * rows // all_rows


@dataclass(frozen=True)
class Rotaries:
    """RoPE's cosines and sines at the positions of the queries and of the keys."""

    queries: Rotary
    keys: Rotary


class Encoder(nn.Module):
    """Self-attention blocks, each group by itself."""

    def __init__(self, config: PartitionTransformerConfig, layers: LayerBuilder, numbers: range):
        super().__init__()
        self.blocks = numbered(
            {
                number: SelfAttentionBlock(
                    config.hidden_size, config.num_heads, config.dropout, config.condition_size, layers
                )
                for number in numbers
            }
        )

    def forward(self, x_TH: Tensor, segments: Segments, rotary: Rotary, condition: Tensor) -> Tensor:
        attend = partial(segment_attention, query_segments=segments, key_segments=segments)
        for block in self.blocks:
            x_TH = block(x_TH, rotary, attend, condition)
        return x_TH


class Decoder(nn.Module):
    """GroupSwap, whose output is the first x_QH, and cross-attention blocks over the encoder's final output."""

    def __init__(
        self,
        config: PartitionTransformerConfig,
        length: int,
        layers: LayerBuilder,
        numbers: range,
        has_group_swap: bool,
    ):
        super().__init__()
        self.group_swap = GroupSwap(config, length, layers) if has_group_swap else None
        self.layers = numbered(
            {
                number: CrossAttentionBlock(
                    config.hidden_size, config.num_heads, config.dropout, config.condition_size, layers
                )
                for number in numbers
            }
        )

    def forward(
        self,
        x_QH: Tensor,
        encoded_TH: Tensor,
        inputs: PartitionInputs,
        rotaries: Rotaries,
        condition: Tensor,
    ) -> Tensor:
        for layer in self.layers:
            x_QH = layer(x_QH, encoded_TH, rotaries.queries, rotaries.keys, attend_swapped(inputs), condition)
        return x_QH


def attend_swapped(inputs: PartitionInputs) -> Attend:
    """Attention of every query segment over the key segment of the same index, which is the other group's."""
    return partial(segment_attention, query_segments=inputs.query_segments, key_segments=inputs.segments)


class GroupSwap(nn.Module):
    """Cross-attention whose queries know only their position (FACTS 1.3): the decoder stream's first value.

    Queries start as a learned vector; `+freqs` adds a sinusoidal position, `+mean` and `+logsumexp` an
    aggregate of the encodings they will read. The aggregate goes in before the norm and the projection, as in
    the authors' code (the paper's equation 11 has it after). No residual, gate or norm on the keys.
    """

    def __init__(self, config: PartitionTransformerConfig, length: int, layers: LayerBuilder):
        super().__init__()
        hidden = config.hidden_size
        parts = config.group_swap_query.split("+")
        self.local_heads = config.num_heads // layers.tensor_parallel_size
        self.own_tokens, self.all_tokens = layers.own_tokens, layers.all_tokens
        self.aggregate = _AGGREGATES.get(parts[-1])
        self.base_embedding = fill_with(nn.Parameter(torch.randn(1, hidden)), normal)
        self.pre_query_norm = nn.LayerNorm(hidden)
        fill_with(self.pre_query_norm.weight, ones)
        fill_with(self.pre_query_norm.bias, zeros)
        self.query_processor: nn.Module
        if config.group_swap_processor == "linear":
            self.query_processor = layers.column_linear(hidden, hidden, bias=True)
        else:  # only the last linear is split, because its output is what goes to the heads
            self.query_processor = nn.Sequential(
                layers.replicated_linear(hidden, MLP_RATIO * hidden, bias=True),
                nn.SiLU(),
                layers.column_linear(MLP_RATIO * hidden, hidden, bias=True),
            )
        self.hidden_to_key_value = layers.column_linear(hidden, 2 * hidden, bias=True, fused_parts=2)
        self.output_linear = layers.row_linear(hidden, hidden, bias=True)
        self.position_table = PositionTable(length, hidden) if "freqs" in parts else None

    def forward(self, encoded_TH: Tensor, inputs: PartitionInputs, rotaries: Rotaries) -> Tensor:
        queries_QH = self.base_embedding.expand(inputs.query_positions_Q.shape[0], -1)
        if self.position_table is not None:
            queries_QH = queries_QH + self.position_table(inputs.query_positions_Q, queries_QH.dtype)
        if self.aggregate is not None:
            aggregates_SH = self.aggregate(self.all_tokens(encoded_TH), inputs.segments).to(queries_QH.dtype)
            # An embedding look-up, because its backward pass sums in a fixed order on a GPU too.
            queries_QH = queries_QH + nn.functional.embedding(inputs.query_segments.ids_T, aggregates_SH)
        processed = self.query_processor(self.pre_query_norm(self.own_tokens(queries_QH)))
        (q_QND,) = split_heads(processed, 1, self.local_heads)
        k_TND, v_TND = split_heads(self.hidden_to_key_value(encoded_TH), 2, self.local_heads)
        attend = attend_swapped(inputs)
        attended = attend(rotate(q_QND, rotaries.queries), rotate(k_TND, rotaries.keys), v_TND)
        return self.output_linear(attended.flatten(-2))


def segment_mean(x_TH: Tensor, segments: Segments) -> Tensor:
    """fp32 `[S, H]`: the mean of each segment's rows, 0 for an empty one."""
    counts_S1 = segments.offsets_S1.diff().clamp(min=1)[:, None]
    return _segment_reduce(x_TH.float(), "sum", segments) / counts_S1


def segment_logsumexp(x_TH: Tensor, segments: Segments) -> Tensor:
    """fp32 `[S, H]`: the log-sum-exp of each segment's rows, 0 for an empty one."""
    x_TH = x_TH.float()
    is_empty_S1 = (segments.offsets_S1.diff() == 0)[:, None]
    # The largest value only keeps exp in range, so nothing flows through it.
    peak_SH = _segment_reduce(x_TH.detach(), "max", segments).masked_fill(is_empty_S1, 0.0)
    sums_SH = _segment_reduce((x_TH - peak_SH[segments.ids_T]).exp(), "sum", segments)
    return peak_SH + sums_SH.masked_fill(is_empty_S1, 1.0).log()


def _segment_reduce(x_TH: Tensor, reduction: str, segments: Segments) -> Tensor:
    # unsafe skips a check of the offsets, which would wait for the device.
    return torch.segment_reduce(x_TH, reduction, offsets=segments.offsets_S1.long(), axis=0, unsafe=True)


_AGGREGATES: dict[str, Callable[[Tensor, Segments], Tensor]] = {
    "mean": segment_mean,
    "logsumexp": segment_logsumexp,
}
