"""The MaskGIT transformer (Halton-MaskGIT; FACTS 2.1): masked VQ codes of an image and its class -> all codes.

It differs from the other models in every part: RMS norms, SiLU before each modulation, queries and keys that are
normalised over the full width, SwiGLU, learned positions, dropout of attention weights, and an output linear whose
weight is the token table. That tie is one `Parameter` in two modules: `named_parameters`, and so a checkpoint, has
it once, as `tok_emb.weight`; a `state_dict` has both published names.

Rows of data start with BOS, which this model does not know: its tables have a row less than the vocabulary and than
the row of data. Registers are learned rows without position behind the codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.config import MaskGITTransformerConfig
from pgm_scale.models.blocks import modulation
from pgm_scale.models.dropout import attention_with_dropout, dropout
from pgm_scale.models.initialization import initialise, normal_of, uniform, zeros
from pgm_scale.models.layers import (
    LOCAL_LAYERS,
    LayerBuilder,
    RMSNorm,
    gated_residual,
    own_pieces,
    zero_linear,
)
from pgm_scale.models.readout import Readout, logits
from pgm_scale.models.stages import Span, numbered, whole_span

EMBEDDING_DEVIATION = 0.02  # of the initial values of all tables
_FEED_FORWARD_MULTIPLE = 256


def feed_forward_size(hidden_size: int) -> int:
    """Hidden units of SwiGLU: 2/3 of 4 x H, as three matrices then weigh as much as an MLP's two, rounded up."""
    return -(-int(8 * hidden_size / 3) // _FEED_FORWARD_MULTIPLE) * _FEED_FORWARD_MULTIPLE


class MaskGITTransformer(nn.Module):
    """Names and initial values of the published model. A pipeline stage holds a `span` of its units.

    Every stage has the class table, which all modulations read, and the token table, which the first and the last
    one read: `models.stages.is_shared`.
    """

    def __init__(
        self,
        config: MaskGITTransformerConfig,
        vocab_size: int,
        length: int,
        layers: LayerBuilder = LOCAL_LAYERS,
        span: Span | None = None,
    ):
        """`vocab_size` and `length` are the data's, BOS included."""
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.span = span = span or whole_span(config)
        self.builder = layers
        hidden, has_embedding = config.hidden_size, 0 in span
        self.cls_emb = _drawn(nn.Embedding(config.num_classes + 1, hidden))
        self.tok_emb = _drawn(layers.token_table(vocab_size - 1, hidden))
        self.pos_emb = _drawn(nn.Embedding(length - 1, hidden)) if has_embedding else None
        self.transformer = MaskGITEncoder(config, layers, span.numbers(1, config.num_blocks))
        self.last_norm = self.head = None
        if 1 + config.num_blocks in span:
            self.last_norm = ModulatedNorm(hidden, layers)
            self.head = _tied_linear(self.tok_emb, layers.vocab_linear(hidden, vocab_size - 1))
        has_registers = has_embedding and config.registers > 0
        self.reg_tokens = _drawn(nn.Embedding(config.registers, hidden)) if has_registers else None

    def forward(
        self,
        tokens_BL: Tensor,
        classes_B: Tensor,
        readout: Readout = logits,
        received: Tensor | None = None,
    ) -> Any:
        """The readout of the codes' hidden states `[B, L - 1, H]`; by default fp32 logits `[B, L - 1, V - 1]`.

        Args:
            tokens_BL: int64 rows of data, BOS first, which is dropped; the mask id where a code is masked.
            classes_B: int64 class of each image; `num_classes` is no class.
            readout: what to make of the hidden states.
            received: the stream `[B * (L - 1 + R), H]` of the stage before, in a stage that starts inside the
                model; one that ends inside returns its own.
        """
        x_TH = received if self.pos_emb is None else self._embedded(tokens_BL[:, 1:])
        assert x_TH is not None, "a stage without the embedding needs what the stage before it sends"
        condition_P1H = self.cls_emb(own_pieces(classes_B, self.builder))[:, None].to(x_TH.dtype)
        x_TH = self.transformer(x_TH, condition_P1H, sequences=len(tokens_BL))
        if self.last_norm is None:
            return x_TH
        hidden_TH = self.builder.all_tokens(self.last_norm(x_TH, condition_P1H))
        codes = tokens_BL.shape[1] - 1
        return readout(hidden_TH.unflatten(0, (len(tokens_BL), -1))[:, :codes], self.head)

    def rows_before(self, unit: int, tokens_BL: Tensor, classes_B: Tensor) -> int:
        """Rows of H that pass into a unit from the one before it."""
        sequences, length = tokens_BL.shape
        return sequences * (length - 1 + self.config.registers)

    def _embedded(self, codes_BK: Tensor) -> Tensor:
        """`[T, H]` of T = B * (K + R): codes with their positions, and the registers.

        The token table is also asked for the registers' places, with any code, because under sequence parallelism
        it shares out what it is asked for.
        """
        assert self.pos_emb is not None
        sequences, codes = codes_BK.shape
        padded_BS = F.pad(codes_BK, (0, self.config.registers))
        places_S = torch.arange(padded_BS.shape[1], device=codes_BK.device)
        added_SH = self.pos_emb(places_S[:codes])
        if self.reg_tokens is not None:
            added_SH = torch.cat([added_SH, self.reg_tokens(places_S[: self.config.registers])])
        own = self.builder.own_tokens
        is_code_T1 = own((places_S < codes).repeat(sequences))[:, None]
        tokens_TH = self.tok_emb(padded_BS.flatten())
        return torch.where(is_code_T1, tokens_TH, 0.0) + own(added_SH.repeat(sequences, 1))


class MaskGITEncoder(nn.Module):
    """The blocks, under the published name of their list."""

    def __init__(self, config: MaskGITTransformerConfig, layers: LayerBuilder, numbers: range):
        super().__init__()
        self.layers = numbered({number: MaskGITBlock(config, layers) for number in numbers})

    def forward(self, x_TH: Tensor, condition_P1H: Tensor, sequences: int) -> Tensor:
        for block in self.layers:
            x_TH = block(x_TH, condition_P1H, sequences)
        return x_TH


class MaskGITBlock(nn.Module):
    """Pre-norm self-attention and SwiGLU, each modulated and added through a gate that starts at 0."""

    def __init__(self, config: MaskGITTransformerConfig, layers: LayerBuilder):
        super().__init__()
        hidden = config.hidden_size
        self.mlp = nn.Sequential(
            nn.SiLU(), zero_linear(layers.replicated_linear(hidden, 6 * hidden, bias=True))
        )
        self.ln1 = RMSNorm(hidden)
        self.attn = Attention(config, layers)
        self.ln2 = RMSNorm(hidden)
        self.ff = SwiGLU(config, layers)

    def forward(self, x_TH: Tensor, condition_P1H: Tensor, sequences: int) -> Tensor:
        """x `[T, H]` of whole sequences; condition `[P, 1, H]`, one for T / P consecutive rows of this rank."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.mlp, condition_P1H, 6)
        x_TH = gated_residual(x_TH, self.attn(self.ln1(x_TH, shift1, scale1), sequences), gate1)
        return gated_residual(x_TH, self.ff(self.ln2(x_TH, shift2, scale2)), gate2)


class Attention(nn.Module):
    """Every row reads all rows of its sequence; dropout of the weights and of the projection."""

    def __init__(self, config: MaskGITTransformerConfig, layers: LayerBuilder):
        super().__init__()
        hidden = config.hidden_size
        self.dropout, self.builder = config.dropout, layers
        self.head_size = hidden // config.num_heads
        self.wq, self.wk, self.wv = (
            _xavier(layers.column_linear(hidden, hidden, bias=False), hidden, hidden) for _ in range(3)
        )
        self.wo = _xavier(layers.row_linear(hidden, hidden, bias=False), hidden, hidden)

    def forward(self, x_TH: Tensor, sequences: int) -> Tensor:
        q, k = self.builder.rms_norms(self.wq(x_TH), self.wk(x_TH))
        q_BNSD, k_BNSD, v_BNSD = (
            x.unflatten(-1, (-1, self.head_size)).unflatten(0, (sequences, -1)).transpose(1, 2)
            for x in (q, k, self.wv(x_TH))
        )
        rate = self.dropout if self.training else 0.0
        with self.builder.own_draws(x_TH.device, needed=rate > 0):
            attended_BNSD = attention_with_dropout(q_BNSD, k_BNSD, v_BNSD, rate)
        return dropout(self.wo(attended_BNSD.transpose(1, 2).flatten(0, 1).flatten(-2)), rate, self.training)


class SwiGLU(nn.Module):
    """w2 (silu(w1 x) * w3 x), with dropout of the hidden units."""

    def __init__(self, config: MaskGITTransformerConfig, layers: LayerBuilder):
        super().__init__()
        hidden, inner = config.hidden_size, feed_forward_size(config.hidden_size)
        self.dropout, self.builder = config.dropout, layers
        self.w1 = _xavier(layers.column_linear(hidden, inner, bias=False), hidden, inner)
        self.w2 = _xavier(layers.row_linear(inner, hidden, bias=False), inner, hidden)
        self.w3 = _xavier(layers.column_linear(hidden, inner, bias=False), hidden, inner)

    def forward(self, x_TH: Tensor) -> Tensor:
        units = F.silu(self.w1(x_TH)) * self.w3(x_TH)
        rate = self.dropout if self.training else 0.0
        with self.builder.own_draws(x_TH.device, needed=rate > 0):
            units = dropout(units, rate, self.training)
        return self.w2(units)


class ModulatedNorm(nn.Module):
    """The last norm, with a bias, shifted and scaled by the condition."""

    def __init__(self, hidden_size: int, layers: LayerBuilder):
        super().__init__()
        self.norm_final = RMSNorm(hidden_size, bias=True)
        linear = layers.replicated_linear(hidden_size, 2 * hidden_size, bias=True)
        self.mlp = nn.Sequential(nn.SiLU(), _xavier(linear, hidden_size, 2 * hidden_size))

    def forward(self, x_TH: Tensor, condition_P1H: Tensor) -> Tensor:
        shift, scale = modulation(self.mlp, condition_P1H, 2)
        return self.norm_final(x_TH, shift, scale)


def _drawn(table: Any) -> Any:
    initialise(table.weight, normal_of(EMBEDDING_DEVIATION))
    return table


def _tied_linear(table: Any, linear: Any) -> nn.Module:
    """The output linear over the token table's own weight, whose bias starts at 0."""
    linear.weight = table.weight
    initialise(linear.bias, zeros)
    return linear


def _xavier(linear: Any, in_features: int, out_features: int) -> Any:
    """A linear, split or whole, with Glorot's uniform weight and a bias of 0."""
    initialise(linear.weight, uniform((6 / (in_features + out_features)) ** 0.5))
    if linear.bias is not None:
        initialise(linear.bias, zeros)
    return linear
