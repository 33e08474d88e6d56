"""Tensor parallelism: the models' layers, split over a group by Megatron-core (its sections 3 and, for sequence
parallelism, Korthikanti et al. 2022).

Every split parameter carries its `slice`, so that initial values and checkpoints know which part of the whole it
is (`note_slices` then writes on all others that they are whole, and equal on every rank). With sequence parallelism
the tensors between two blocks are `[T / ranks, H]`: each rank normalises its own tokens, and whole parameters get
partial gradients, which `sum_partial_gradients` adds up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from pgm_scale.models.chunked_nll import chunked_nll
from pgm_scale.models.chunking import VocabularyRange
from pgm_scale.models.divergence import DivergenceKind, TeacherOutput, chunked_divergence
from pgm_scale.models.initialization import fill_with, is_split, uniform
from pgm_scale.models.layers import RMS_EPSILON, fill_linear
from pgm_scale.tensor_slices import TensorSlice


class TensorParallelLayers:
    """A `LayerBuilder` over a tensor-parallel group."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.rank, self.tensor_parallel_size = group.rank(), group.size()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=group.size(),
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,  # on torch's default device, that is
            perform_initialization=False,
        )
        # The output layer gathers its tokens itself, and the gather sums their gradients.
        self.output_config = dataclasses.replace(self.config, sequence_parallel=False)

    @property
    def token_ranks(self) -> int:
        return self.tensor_parallel_size if self.sequence_parallel else 1

    def column_linear(
        self, in_features: int, out_features: int, bias: bool, fused_parts: int = 1
    ) -> nn.Module:
        linear = ColumnLinear(
            in_features, out_features, bias=bias, gather_output=False, **self._settings(self.config)
        )
        self._split_rows(linear.weight, (out_features, in_features), fused_parts)
        if bias:
            self._split_rows(linear.bias, (out_features,), fused_parts)
        return fill_linear(linear, in_features)

    def row_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        linear = RowLinear(
            in_features,
            out_features,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            **self._settings(self.config),
        )
        run = in_features // self.tensor_parallel_size
        shape = (out_features, in_features)
        _split(linear.weight, TensorSlice(shape, self.rank * run, run, stride=in_features))
        return fill_linear(linear, in_features)

    def replicated_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return fill_linear(nn.Linear(in_features, out_features, bias), in_features)

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        embedding = self._vocabulary_table(ParallelVocabularyEmbedding, vocab_size, hidden_size)
        fill_with(embedding.weight, uniform(hidden_size**-0.5))
        return embedding

    def token_table(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return self._vocabulary_table(ParallelTokenTable, vocab_size, hidden_size)

    def _vocabulary_table(self, kind: type[ParallelTokenTable], vocab_size: int, hidden_size: int) -> Any:
        table = kind(
            self.padded(vocab_size),
            hidden_size,
            reduce_scatter_embeddings=self.sequence_parallel,
            **self._settings(self.config),
        )
        self._split_vocabulary(table.weight, (vocab_size, hidden_size))
        return table

    def vocab_linear(self, hidden_size: int, vocab_size: int) -> nn.Module:
        linear = ParallelVocabularyLinear(
            hidden_size,
            self.padded(vocab_size),
            gather_output=False,
            disable_grad_reduce=self.sequence_parallel,
            **self._settings(self.output_config),
        )
        linear.vocab_size = vocab_size
        self._split_vocabulary(linear.weight, (vocab_size, hidden_size))
        self._split_vocabulary(linear.bias, (vocab_size,))
        return fill_linear(linear, hidden_size)

    def rms_norms(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """One all-reduce of a number a token and tensor, and one of their gradients, which come from all ranks."""
        width = columns[0].shape[-1] * self.tensor_parallel_size
        squares = torch.stack([x.float().square().sum(-1, keepdim=True) for x in columns])
        sums = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        factors = (copy_to_tensor_model_parallel_region(sums, group=self.group) / width + RMS_EPSILON).rsqrt()
        return tuple((x * factor).to(x.dtype) for x, factor in zip(columns, factors, strict=True))

    @contextmanager
    def own_draws(self, device: torch.device, needed: bool) -> Iterator[None]:
        if not needed:
            yield
            return
        seed = int(torch.randint(1 << 62, (), device="cpu"))  # the same on all ranks
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield

    def own_tokens(self, x: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return x
        share = x.shape[0] // self.tensor_parallel_size
        return x.narrow(0, self.rank * share, share)

    def all_tokens(self, x: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(x, group=self.group) if self.sequence_parallel else x

    def padded(self, vocab_size: int) -> int:
        """Rows of the split vocabulary: padded at its end, maybe over several ranks; padding is never predicted."""
        return -(-vocab_size // self.tensor_parallel_size) * self.tensor_parallel_size

    def _settings(self, config: ModelParallelConfig) -> dict[str, Any]:
        return {"config": config, "init_method": _no_initialisation, "tp_group": self.group}

    def _split_rows(self, parameter: nn.Parameter, shape: tuple[int, ...], parts: int) -> None:
        stride = parameter.numel() * self.tensor_parallel_size // parts
        run = stride // self.tensor_parallel_size
        _split(parameter, TensorSlice(shape, self.rank * run, run, stride))

    def _split_vocabulary(self, parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
        row = parameter.numel() // parameter.shape[0]
        start = min(self.rank * parameter.shape[0], shape[0])
        rows = min(parameter.shape[0], shape[0] - start)
        _split(parameter, TensorSlice(shape, start * row, rows * row, stride=shape[0] * row))


def _no_initialisation(_: Tensor) -> None:
    """`models.initialization` draws the weights."""


def _split(parameter: nn.Parameter, part: TensorSlice) -> None:
    parameter.slice = part  # type: ignore[attr-defined]


class _Autocasting:
    """A Megatron linear that obeys autocast.

    Megatron's own product asks for CUDA's autocast only, and sends gradients of the product's dtype to buffers of
    the input's; so input and weight are cast before it, and their gradients come back in their own dtype.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        product = super()._forward_impl  # type: ignore[misc]
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return product(input=input, weight=weight, bias=bias, **options)
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return product(input=input.to(dtype), weight=weight.to(dtype), bias=bias, **options)


class ColumnLinear(_Autocasting, ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class RowLinear(_Autocasting, RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class ParallelTokenTable(VocabParallelEmbedding):
    """Megatron's, over tokens `[T]`."""

    def forward(self, tokens_T: Tensor) -> Tensor:
        """`[T, H]`, or this rank's `[T / ranks, H]`."""
        if self.reduce_scatter_embeddings:
            return super().forward(tokens_T[None]).squeeze(1)  # Megatron takes [B, L] and gives [L, B, H]
        return super().forward(tokens_T)


class ParallelVocabularyEmbedding(ParallelTokenTable):
    """With the published name of the table of text models."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.embedding = self._parameters.pop("weight")

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(
            "embedding" if name == "weight" and "embedding" in self._parameters else name
        )


class ParallelVocabularyLinear(_Autocasting, ColumnParallelLinear):
    """An `OutputLinear` of which every rank holds a range of the vocabulary."""

    vocab_size: int

    def forward(self, hidden: Tensor, compute: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """fp32 logits of the whole vocabulary, or what `compute` makes of the hidden states."""
        if compute is not None:
            return compute(hidden)
        scores = gather_from_tensor_model_parallel_region(self.own_scores(hidden), group=self.tp_group)
        return scores[..., : self.vocab_size]

    def token_nll(
        self, hidden: Tensor, targets: Tensor, excluded_id: int | None, loss_weights: Tensor | None
    ) -> Tensor:
        return self(
            self._with_summed_gradient(hidden),
            lambda given: chunked_nll(
                given, self.weight, self.bias, targets, excluded_id, loss_weights, self._held()
            ),
        )

    def divergence(
        self,
        hidden: Tensor,
        teacher: TeacherOutput,
        kind: DivergenceKind,
        excluded_id: int | None,
        loss_weights: Tensor | None,
    ) -> Tensor:
        return self(
            self._with_summed_gradient(hidden),
            lambda given: chunked_divergence(
                given, self.weight, self.bias, teacher, kind, excluded_id, loss_weights, self._held()
            ),
        )

    def _with_summed_gradient(self, hidden: Tensor) -> Tensor:
        """Each rank makes the gradient through its range. Under sequence parallelism the gather sums them."""
        if self.disable_grad_reduce:
            return hidden
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

    def _held(self) -> VocabularyRange:
        def reduced(operation: dist.ReduceOp.RedOpType) -> Callable[[Tensor], Tensor]:
            def reduce(values: Tensor) -> Tensor:
                dist.all_reduce(values, operation, group=self.tp_group)
                return values

            return reduce

        first = self.tp_group.rank() * self.weight.shape[0]
        return VocabularyRange(self.vocab_size, first, reduced(dist.ReduceOp.SUM), reduced(dist.ReduceOp.MAX))

    def log_probabilities(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return self(hidden, lambda given: self._log_probabilities(given, ids))

    def _log_probabilities(self, hidden: Tensor, ids: Tensor) -> Tensor:
        scores = self.own_scores(hidden)
        chosen = self._choose(scores, ids)  # first, because Megatron's cross-entropy overwrites the scores
        nll = vocab_parallel_cross_entropy(scores, ids[..., 0].contiguous())
        return chosen - (nll + chosen[..., 0])[..., None]

    def own_scores(self, hidden: Tensor) -> Tensor:
        """fp32 logits of this rank's range; -inf where rows only pad the range."""
        scores = super().forward(hidden)[0].float()
        own_rows = max(0, self.vocab_size - self.tp_group.rank() * scores.shape[-1])
        if own_rows >= scores.shape[-1]:
            return scores
        removed_V = scores.new_zeros(scores.shape[-1])
        removed_V[own_rows:] = -torch.inf
        return scores + removed_V

    def _choose(self, scores: Tensor, ids: Tensor) -> Tensor:
        """The scores of `ids` [..., K], each from the rank that has it.

        By index and not by gather, which would keep the scores for its backward pass; and masked, not multiplied,
        because a rank that has only padding would make 0 x -inf of it.
        """
        rows = ids - self.tp_group.rank() * scores.shape[-1]
        is_own = (rows >= 0) & (rows < scores.shape[-1])
        flat_scores, flat_rows = scores.flatten(0, -2), rows.masked_fill(~is_own, 0).flatten(0, -2)
        tokens = torch.arange(len(flat_rows), device=rows.device)[:, None]
        chosen = flat_scores[tokens, flat_rows].view(ids.shape).masked_fill(~is_own, 0.0)
        return reduce_from_tensor_model_parallel_region(chosen, group=self.tp_group)


def sum_partial_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Under sequence parallelism: whole parameters saw only this rank's tokens, so sum their gradients.

    In hooks, because ZeRO-2 and 3 reduce a gradient over the data-parallel ranks as soon as it is there. Every
    rank runs the same graph, so the all-reduces, small and many, meet in the same order.
    """

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.float().contiguous()  # bf16 would round the sum
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    for parameter in model.parameters():
        if not is_split(parameter):
            parameter.register_hook(summed)


@contextmanager
def whole_sequences(model: nn.Module, layers: TensorParallelLayers) -> Iterator[None]:
    """Switch sequence parallelism off for a while, without gradients: samplers feed any number of tokens."""
    if not layers.sequence_parallel:
        yield
        return
    switched = [
        (module, name)
        for module in model.modules()
        for name in ("sequence_parallel", "reduce_scatter_embeddings")
        if getattr(module, name, False)
    ]
    layers.sequence_parallel = False
    for module, name in switched:
        setattr(module, name, False)
    try:
        yield
    finally:
        layers.sequence_parallel = True
        for module, name in switched:
            setattr(module, name, True)
