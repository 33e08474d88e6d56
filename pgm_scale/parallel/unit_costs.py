"""What a unit of each kind costs on the device at hand: seconds of forward and backward, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pgm_scale.config import (
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    PartitionTransformerConfig,
    TransformerConfig,
)
from pgm_scale.errors import UserError
from pgm_scale.models import build_model
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.readout import TokenNLL
from pgm_scale.models.segments import Segments
from pgm_scale.models.stages import Span, stream_rows, unit_kinds
from pgm_scale.parallel.construction import recompute

WARM_UP, REPEATS = 2, 5
# Groups of a L and (1 - a) L tokens with this `a` attend as much as groups of a uniformly drawn size do on
# average: a^2 + (1 - a)^2 = 2/3 of all pairs within the groups, 2 a (1 - a) = 1/3 between them.
EXPECTED_GROUP_SHARE = (1 - 3**-0.5) / 2


def measure_unit_costs(
    config: TransformerConfig,
    vocab_size: int,
    length: int,
    micro_batch_sequences: int,
    device: torch.device,
    dtype: torch.dtype,
    recompute_blocks: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Median seconds of forward and backward of a micro-batch through one unit of each kind, on one device.

    Units have their full width, whatever the tensor-parallel size: a split needs only the ratios of the costs.
    One unit is in memory at a time, and the global random generators are left as they were.

    Raises:
        UserError: a unit of full width does not fit the device.
    """
    small = one_of_each_kind(config)
    batch = ExampleBatch(vocab_size, length, micro_batch_sequences, device)
    costs = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for unit, kind in enumerate(unit_kinds(small)):
            progress(f"measuring the cost of the {kind}")
            try:
                costs[kind] = _unit_seconds(small, unit, batch, dtype, recompute_blocks)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"the cost of the {kind} cannot be measured, as it does not fit {device} alone; set "
                    "parallel.stage_units (pgm-scale plan proposes them), or a smaller micro-batch"
                ) from None
    if device.type == "cuda":  # what the run reports of its memory is its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return costs


def _unit_seconds(
    config: TransformerConfig, unit: int, batch: ExampleBatch, dtype: torch.dtype, recompute_blocks: bool
) -> float:
    with batch.device:
        stage = build_model(config, batch.vocab_size, batch.length, span=Span(unit, unit + 1)).to(dtype)
    if recompute_blocks:
        recompute(stage)
    return _median_seconds(stage_forward(stage, config, unit, batch, dtype), batch.device)


def one_of_each_kind(config: TransformerConfig) -> TransformerConfig:
    """The same model with a single block of each kind that it has."""
    if isinstance(config, PartitionTransformerConfig):
        encoder, decoder = min(1, config.num_encoder_blocks), min(1, config.num_decoder_blocks)
        return replace(config, num_encoder_blocks=encoder, num_decoder_blocks=decoder)
    return replace(config, num_blocks=min(1, config.num_blocks))


@dataclass(frozen=True)
class ExampleBatch:
    """A micro-batch of made-up tokens, which costs what real ones cost on average."""

    vocab_size: int
    length: int
    sequences: int
    device: torch.device

    def model_arguments(self, config: TransformerConfig) -> tuple[Any, ...]:
        """What the model is called with, before `readout` and `received`."""
        tokens_BL = torch.zeros(self.sequences, self.length, dtype=torch.long, device=self.device)
        if isinstance(config, PartitionTransformerConfig):
            return (self._partition(config),)
        if isinstance(config, DiffusionTransformerConfig):
            return tokens_BL, torch.zeros(self.sequences, device=self.device)
        if isinstance(config, MaskGITTransformerConfig):
            return tokens_BL, tokens_BL[:, 0]
        return (tokens_BL,)

    def _partition(self, config: PartitionTransformerConfig) -> PartitionInputs:
        keys, queries = (stream_rows(config, kind, self.length) for kind in ("group_swap", "output"))
        first = round(EXPECTED_GROUP_SHARE * queries)
        first_keys = first + (keys - queries) // 2  # of images, there are registers and BOS besides
        positions_T, positions_Q = (
            torch.arange(rows, device=self.device).repeat(self.sequences) for rows in (keys, queries)
        )
        return PartitionInputs(
            torch.zeros_like(positions_T),
            positions_T,
            Segments.of((first_keys, keys - first_keys) * self.sequences, self.device),
            positions_Q,
            Segments.of((queries - first, first) * self.sequences, self.device),
            positions_Q.new_zeros(self.sequences) if config.num_classes else None,
        )

    def readout(self, config: TransformerConfig) -> TokenNLL:
        """The NLL of each token, as the objectives ask for it."""
        per_sequence = stream_rows(config, "output", self.length)
        shape: tuple[int, ...] = (self.sequences, per_sequence)
        if isinstance(config, PartitionTransformerConfig):
            shape = (self.sequences * per_sequence,)
        if isinstance(config, MaskGITTransformerConfig):
            shape = (self.sequences, self.length - 1)  # codes, without the registers
        targets = torch.zeros(shape, dtype=torch.long, device=self.device)
        return TokenNLL(targets, self.vocab_size - 1, torch.ones(shape, device=self.device))


def stage_forward(
    stage: Any,
    config: TransformerConfig,
    first_unit: int,
    batch: ExampleBatch,
    dtype: torch.dtype,
    token_ranks: int = 1,
) -> Callable[[], Tensor]:
    """The forward pass of a stage that starts at `first_unit`, as a pipeline runs it for a micro-batch.

    Under sequence parallelism `token_ranks` is how many ranks share what the stage is sent.
    """
    arguments, readout = batch.model_arguments(config), batch.readout(config)
    received = None
    if first_unit > 0:
        rows = stage.rows_before(first_unit, *arguments) // token_ranks
        received = torch.zeros(rows, config.hidden_size, dtype=dtype, device=batch.device, requires_grad=True)
    return lambda: stage(*arguments, readout=readout, received=received)


def backward(result: Tensor) -> None:
    torch.autograd.backward(result, torch.ones_like(result))


def _median_seconds(forward: Callable[[], Tensor], device: torch.device) -> float:
    for _ in range(WARM_UP):
        backward(forward())
    return median(_seconds(forward, device) for _ in range(REPEATS))


def _seconds(forward: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    backward(forward())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
