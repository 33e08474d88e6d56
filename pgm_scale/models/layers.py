"""The parts that every model shares; the linears come from a `LayerBuilder`.

Precision: activations, the residual stream included, have the dtype of the embedding's weights (bf16 when the
engine casts the module). Layer norms read and write that dtype and compute in fp32; rotary tables are kept in
fp32 and rounded once; logits leave in fp32 (`vocabulary`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.models.host_matmul import HostLinear
from pgm_scale.models.initialization import fill_with, normal, ones, uniform, zeros
from pgm_scale.models.vocabulary import VocabularyEmbedding, VocabularyLinear

Linear = TypeVar("Linear", bound=nn.Module)
FREQUENCY_BASE = 10000.0
RMS_EPSILON = 1e-5
TIME_FEATURES = 256


class LayerBuilder(Protocol):
    """Makes the layers that tensor parallelism splits; every module takes and returns plain tensors.

    `fused_parts` says how many equally tall matrices a column-parallel linear stacks (3 for q, k, v): each of
    them is split over the ranks on its own, by heads.
    """

    @property
    def tensor_parallel_size(self) -> int: ...

    @property
    def token_ranks(self) -> int:
        """How many ranks share the tokens between blocks: 1 without sequence parallelism."""

    def column_linear(
        self, in_features: int, out_features: int, bias: bool, fused_parts: int = 1
    ) -> nn.Module: ...

    def row_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module: ...

    def replicated_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module: ...

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module: ...

    def vocab_linear(self, hidden_size: int, vocab_size: int) -> nn.Module: ...

    def token_table(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """A `vocab_embedding` whose table is called `weight`, split like that of the `vocab_linear`."""

    def rms_norms(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Each `[T, H / ranks]` over its root mean square over all H, of which every rank has its columns."""

    def own_draws(self, device: torch.device, needed: bool) -> AbstractContextManager[None]:
        """Draws that no other rank makes: dropout of what ranks hold parts of. Behind it all ranks go on alike."""

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's share of `[T, H]` tokens where sequence parallelism splits them, else all of them."""

    def all_tokens(self, x: Tensor) -> Tensor:
        """All tokens `[T, H]` from the ranks' shares; their gradients are summed over the ranks."""


class LocalLayers:
    """One device holds everything."""

    tensor_parallel_size = 1
    token_ranks = 1

    def column_linear(
        self, in_features: int, out_features: int, bias: bool, fused_parts: int = 1
    ) -> nn.Module:
        return fill_linear(HostLinear(in_features, out_features, bias), in_features)

    def row_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return fill_linear(HostLinear(in_features, out_features, bias), in_features)

    def replicated_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return fill_linear(HostLinear(in_features, out_features, bias), in_features)

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return VocabularyEmbedding(vocab_size, hidden_size)

    def vocab_linear(self, hidden_size: int, vocab_size: int) -> nn.Module:
        return VocabularyLinear(hidden_size, vocab_size)

    def token_table(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return nn.Embedding(vocab_size, hidden_size)

    def rms_norms(self, *columns: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(rms_normed, columns))

    def own_draws(self, device: torch.device, needed: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def own_tokens(self, x: Tensor) -> Tensor:
        return x

    def all_tokens(self, x: Tensor) -> Tensor:
        return x


LOCAL_LAYERS = LocalLayers()


def fill_linear(linear: Linear, in_features: int) -> Linear:
    """A linear, split or whole, whose weight and bias start in U(-1/sqrt(in), 1/sqrt(in)), torch's default."""
    for parameter in linear.parameters(recurse=False):
        fill_with(parameter, uniform(in_features**-0.5))
    return linear


class LayerNorm(nn.Module):
    """Layer norm with weight only, eps 1e-5, and optionally adaLN's `x * (1 + scale) + shift` behind it.

    The kernel reads and writes the activations' dtype, keeps its statistics in fp32 and rounds once, so no
    fp32 copy of the stream is stored for the backward pass.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = fill_with(nn.Parameter(torch.ones(hidden_size)), ones)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """x `[T, H]`; shift and scale either `[H]`, one for all tokens, or `[B, 1, H]`, one a sequence."""
        weight = self.weight
        if shift is None or scale is None:
            return F.layer_norm(x, weight.shape, weight.to(x.dtype), None)
        if scale.dim() == 1:  # one condition for all: norm and modulation are one kernel
            folded = weight.float() * (1 + scale.float())
            return F.layer_norm(x, weight.shape, folded.to(x.dtype), shift.to(x.dtype))
        normed = F.layer_norm(x, weight.shape, weight.to(x.dtype), None)
        return torch.addcmul(shift, normed.unflatten(0, (len(scale), -1)), 1 + scale).flatten(0, 1)


class RMSNorm(nn.Module):
    """RMS norm with weight and maybe bias, eps 1e-5, and `x * (1 + scale) + shift` behind it (FACTS 2.1)."""

    def __init__(self, hidden_size: int, bias: bool = False):
        super().__init__()
        self.weight = fill_with(nn.Parameter(torch.ones(hidden_size)), ones)
        self.bias = fill_with(nn.Parameter(torch.zeros(hidden_size)), zeros) if bias else None

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x `[T, H]`; shift and scale `[P, 1, H]`, one for T / P consecutive rows."""
        factor = self.weight.to(scale.dtype) * (1 + scale)
        if self.bias is not None:
            shift = torch.addcmul(shift, self.bias.to(scale.dtype), 1 + scale)
        return torch.addcmul(shift, rms_normed(x).unflatten(0, (len(scale), -1)), factor).flatten(0, 1)


def rms_normed(x: Tensor) -> Tensor:
    """x `[..., H]` over its root mean square, computed in fp32.

    torch has a kernel for it on a GPU only; on a CPU its parts are fewer here, 3 passes over x instead of 7.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON).to(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * (norm.square() / x.shape[-1] + RMS_EPSILON).rsqrt()).to(x.dtype)


class TimeEmbedding(nn.Module):
    """The condition vector of noise levels sigma (FACTS 1.2); the embedding MLP and the SiLU behind it.

    Everything but time-conditioned models feeds sigma = 0, which makes it one learned constant.
    """

    def __init__(self, condition_size: int, layers: LayerBuilder):
        super().__init__()
        self.mlp = nn.Sequential(
            layers.replicated_linear(TIME_FEATURES, condition_size, bias=True),
            nn.SiLU(),
            layers.replicated_linear(condition_size, condition_size, bias=True),
        )

    def forward(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Conditions `[..., c]` in `dtype` of sigma `[...]`."""
        half = TIME_FEATURES // 2
        steps = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angles = sigma.float()[..., None] * torch.exp(-math.log(FREQUENCY_BASE) / half * steps)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return F.silu(self.mlp(features.to(dtype)))


class ClassEmbedding(nn.Module):
    """The condition vector of classes: a row of a table, used as it is (FACTS 2.1); the last row is "no class"."""

    def __init__(self, num_classes: int, condition_size: int, layers: LayerBuilder):
        super().__init__()
        self.layers = layers
        self.embedding_table = nn.Embedding(num_classes + 1, condition_size)
        fill_with(self.embedding_table.weight, normal)

    def forward(self, classes_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Conditions `[P, 1, c]` in `dtype` of int64 classes, one a sequence: see `own_pieces`."""
        return self.embedding_table(own_pieces(classes_B, self.layers))[:, None].to(dtype)


def own_pieces(values_B: Tensor, layers: LayerBuilder) -> Tensor:
    """`[P]`, the value of each piece of this rank's tokens, from one a sequence.

    Without sequence parallelism the pieces are the sequences.

    With it a rank's tokens are P consecutive pieces of one length, none of which crosses the end of a sequence:
    lcm(B, ranks) pieces are the fewest that both cuts allow, whatever the number of tokens.
    """
    sequences = len(values_B)
    pieces = math.lcm(sequences, layers.token_ranks) // sequences
    return layers.own_tokens(values_B.repeat_interleave(pieces))


class PositionTable(nn.Module):
    """Sinusoidal positions: `position / 10000^(2k / size)` in cosines, then in sines (FACTS 1.3).

    A plain buffer would follow a module's cast to bf16 and come out of `to_empty` uninitialised; the table is
    computed again instead (in fp64, so it is the same on every platform) whenever the module moves.
    """

    cos_LK: Tensor
    sin_LK: Tensor

    def __init__(self, length: int, size: int):
        super().__init__()
        self.length, self.size = length, size
        self.fill(torch.get_default_device())

    def fill(self, device: torch.device) -> None:
        """Compute the table on `device`."""
        positions_L = torch.arange(self.length, dtype=torch.float64, device="cpu")
        exponents_K = torch.arange(0, self.size, 2, dtype=torch.float64, device="cpu") / self.size
        angles_LK = positions_L[:, None] / FREQUENCY_BASE**exponents_K
        for name, table in (("cos_LK", angles_LK.cos()), ("sin_LK", angles_LK.sin())):
            self.register_buffer(name, table.float().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionTable:
        super()._apply(fn, recurse)
        self.fill(self.cos_LK.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Any:
        """`[..., size]` in `dtype` of int64 positions `[...]`: cosines first."""
        return torch.cat([self.cos_LK[positions], self.sin_LK[positions]], dim=-1).to(dtype)


class RotaryTable(PositionTable):
    """RoPE's tables for heads of `head_size` (FACTS 1.4), laid out for `rotate`."""

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[..., 1, D]` in `dtype` of int64 positions `[...]`; 1 is for heads."""
        cos, sin = self.cos_LK[positions].to(dtype), self.sin_LK[positions].to(dtype)
        return torch.cat([cos, cos], dim=-1).unsqueeze(-2), torch.cat([-sin, sin], dim=-1).unsqueeze(-2)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate head vectors `[..., N, D]` by RoPE over halves: a' = a cos - b sin, b' = b cos + a sin."""
    cos, signed_sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


def gated_residual(stream: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """`stream + gate * update` of `[T, H]`; the gate is `[H]`, or `[B, 1, H]`, or none, which is a gate of 1."""
    if gate is None:
        return stream + update
    if gate.dim() == 1:
        return torch.addcmul(stream, gate, update)
    stream, update = (x.unflatten(0, (len(gate), -1)) for x in (stream, update))
    return torch.addcmul(stream, gate, update).flatten(0, 1)


def zero_linear(linear: Any) -> Any:
    """The linear with weight and bias 0, as adaLN and the output linear start (FACTS 1.6)."""
    for parameter in linear.parameters(recurse=False):
        nn.init.zeros_(fill_with(parameter, zeros))
    return linear
