"""What is trained, and the ways to lay it out over GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd

import torch

from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    ComplementaryMDLMObjectiveConfig,
    D3PMObjectiveConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    RunConfig,
    SDTTObjectiveConfig,
    TransformerConfig,
    VQModelConfig,
)
from pgm_scale.errors import UserError
from pgm_scale.models.maskgit import feed_forward_size
from pgm_scale.models.stages import unit_kinds
from pgm_scale.parallel.layout import shared_tokens


@dataclass(frozen=True)
class Workload:
    """A model and its batch, whatever the layout.

    Attributes:
        length: tokens of a sequence, as the model sees it.
        rows_per_sequence: sequences that the model sees for each one of the batch.
    """

    model: TransformerConfig
    vocab_size: int
    length: int
    rows_per_sequence: int
    global_batch_sequences: int
    precision: str
    has_ema: bool
    has_teacher: bool = False

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int, length: int) -> Workload:
        """`length` is that of the data's rows.

        Raises:
            UserError: the model is not a transformer.
        """
        if isinstance(config.model, VQModelConfig):
            raise UserError(
                "model.kind vq: only transformers are planned; a VQ model is small and trains data-parallel only"
            )
        objective = config.objective
        # A mask and its complement; or what the noise has left and what it has not touched.
        doubles = isinstance(objective, ComplementaryMDLMObjectiveConfig) or (
            isinstance(objective, D3PMObjectiveConfig) and not objective.substitution
        )
        return cls(
            config.model,
            vocab_size,
            length - isinstance(objective, AutoregressiveObjectiveConfig),  # a token is the next one's input
            2 if doubles else 1,
            config.training.global_batch_sequences,
            config.training.precision,
            config.training.ema_decay > 0,
            isinstance(objective, SDTTObjectiveConfig),
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def tokens(self) -> int:
        """Of the global batch, each counted once."""
        return self.global_batch_sequences * self.length


@dataclass(frozen=True)
class Sharing:
    """How tensor-parallel ranks share a unit."""

    tensor: int
    sequence_parallel: bool


@dataclass(frozen=True)
class Layout:
    """How ranks share the work; `micro_batches` of `micro_batch_sequences` pass each rank in a step."""

    sharing: Sharing
    pipeline: int
    data: int
    zero_stage: int
    micro_batch_sequences: int
    micro_batches: int
    recompute: bool

    @classmethod
    def of(cls, config: RunConfig, gpus: int) -> Layout:
        """The one that a configuration has, which must divide."""
        parallel, training = config.parallel, config.training
        data = gpus // (parallel.tensor * parallel.pipeline)
        return cls(
            Sharing(parallel.tensor, parallel.sequence_parallel),
            parallel.pipeline,
            data,
            parallel.zero_stage,
            training.micro_batch_sequences,
            training.global_batch_sequences // data // training.micro_batch_sequences,
            training.recompute_blocks,
        )

    @property
    def gpus(self) -> int:
        return self.sharing.tensor * self.pipeline * self.data


def possible_layouts(workload: Workload, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every layout that `parallel.layout.layout_problems` has nothing against, but for some that never pay.

    Left out: tensor parallelism across nodes; ZeRO-0 in bf16, which keeps everything in fp32 on every rank.
    """
    batch, units = workload.global_batch_sequences, len(unit_kinds(workload.model))
    for sharing in _sharings(workload, gpus, gpus_per_node):
        replicas = gpus // sharing.tensor
        for pipeline in _divisors(replicas):
            data = replicas // pipeline
            if pipeline > units or batch % data:
                continue
            for sequences in _divisors(batch // data):
                if not _tokens_divide(workload, sharing, sequences):
                    continue
                micro_batches = batch // data // sequences
                for zero_stage, recompute in product(_zero_stages(workload, pipeline), (False, True)):
                    yield Layout(sharing, pipeline, data, zero_stage, sequences, micro_batches, recompute)


def _sharings(workload: Workload, gpus: int, gpus_per_node: int) -> Iterator[Sharing]:
    model = workload.model
    needs_whole_sequences = isinstance(model, DiffusionTransformerConfig) and model.time_conditioned
    splits = gcd(gpus, gpus_per_node, model.num_heads)
    if isinstance(model, MaskGITTransformerConfig):
        splits = gcd(splits, feed_forward_size(model.hidden_size))
    for tensor in _divisors(splits):
        yield Sharing(tensor, False)
        if tensor > 1 and not needs_whole_sequences:
            yield Sharing(tensor, True)


def _tokens_divide(workload: Workload, sharing: Sharing, sequences: int) -> bool:
    rows = sequences * workload.rows_per_sequence
    tokens = [rows * each for each in shared_tokens(workload.model, workload.length)]
    return not sharing.sequence_parallel or not any(number % sharing.tensor for number in tokens)


def _zero_stages(workload: Workload, pipeline: int) -> tuple[int, ...]:
    if pipeline > 1:
        return (1,)
    return (1, 2, 3) if workload.precision == "bf16" else (0, 1, 2, 3)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
