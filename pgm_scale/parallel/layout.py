"""What a parallel layout needs of a model, a batch and a number of processes, told before any of them exists."""

from __future__ import annotations

from collections.abc import Sequence

from pgm_scale.config import (
    D3PMObjectiveConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    RunConfig,
    TransformerConfig,
    VQModelConfig,
)
from pgm_scale.models.maskgit import feed_forward_size
from pgm_scale.models.stages import stream_rows, unit_kinds


def layout_problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything that does not divide or does not go together, one line each."""
    parallel = config.parallel
    if parallel.tensor < 1 or parallel.pipeline < 1 or config.training.micro_batch_sequences < 1:
        return []  # out of range, which `config.inconsistencies` says
    return [
        *_world_problems(config, world_size),
        *(_vq_problems(config) if isinstance(config.model, VQModelConfig) else _tensor_problems(config)),
        *_stage_problems(config),
    ]


def data_parallel_ranks(config: RunConfig, world_size: int) -> int:
    return world_size // (config.parallel.tensor * config.parallel.pipeline)


def applied_zero_stage(zero_stage: int, data_ranks: int, precision: str, needs_partitions: bool) -> int:
    """0 where ZeRO has nothing to share: one data-parallel rank that computes with its fp32 weights.

    Every stage then holds the same bytes, but the partitions of 1 to 3 cost copies of gradients and weights.

    Args:
        needs_partitions: a pipeline or an offloaded optimizer, which work on them.
    """
    has_work = data_ranks > 1 or precision == "bf16" or needs_partitions
    return zero_stage if has_work else 0


def _world_problems(config: RunConfig, world_size: int) -> list[str]:
    parallel, training = config.parallel, config.training
    ranks_per_model = parallel.tensor * parallel.pipeline
    if world_size % ranks_per_model:
        return [
            f"{world_size} processes are not divisible by parallel.tensor {parallel.tensor} x parallel.pipeline "
            f"{parallel.pipeline} = {ranks_per_model}; start a multiple of {ranks_per_model}, or change the layout"
        ]
    data_ranks = world_size // ranks_per_model
    per_pass = training.micro_batch_sequences * data_ranks
    if training.global_batch_sequences % per_pass:
        return [
            f"training.global_batch_sequences {training.global_batch_sequences} is not divisible by "
            f"micro_batch_sequences {training.micro_batch_sequences} x {data_ranks} data-parallel ranks = "
            f"{per_pass}; change one of them"
        ]
    return []


def _vq_problems(config: RunConfig) -> list[str]:
    """A VQ model has no linears to split and no blocks to recompute: it is trained data-parallel."""
    parallel, problems = config.parallel, []
    if parallel.tensor > 1:
        problems.append(
            f"parallel.tensor {parallel.tensor} does not go with model.kind vq: convolutions are not split; use 1"
        )
    if parallel.sequence_parallel:
        problems.append(
            "parallel.sequence_parallel does not go with model.kind vq: its images are not tokens to share; "
            "switch it off"
        )
    if config.training.recompute_blocks:
        problems.append(
            "training.recompute_blocks does not go with model.kind vq: it has no transformer blocks; use a smaller "
            "training.micro_batch_sequences"
        )
    return problems


def _tensor_problems(config: RunConfig) -> list[str]:
    model, parallel = config.model, config.parallel
    assert not isinstance(model, VQModelConfig)
    problems = []
    if model.num_heads % parallel.tensor:
        problems.append(
            f"model.num_heads {model.num_heads} is not divisible by parallel.tensor {parallel.tensor}; "
            "a tensor-parallel rank holds whole heads"
        )
    if isinstance(model, MaskGITTransformerConfig) and feed_forward_size(model.hidden_size) % parallel.tensor:
        problems.append(
            f"parallel.tensor {parallel.tensor} does not divide the {feed_forward_size(model.hidden_size)} hidden "
            f"units of SwiGLU that model.hidden_size {model.hidden_size} makes; use a power of 2"
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        problems.append("parallel.sequence_parallel needs parallel.tensor of at least 2")
    if (
        parallel.sequence_parallel
        and isinstance(model, DiffusionTransformerConfig)
        and model.time_conditioned
    ):
        problems.append(
            "parallel.sequence_parallel does not go with model.time_conditioned: a rank's tokens are not whole "
            "sequences, each with a time of its own; switch one of them off"
        )
    return problems


def _stage_problems(config: RunConfig) -> list[str]:
    model, parallel = config.model, config.parallel
    kinds = unit_kinds(model)
    problems = []
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        problems.append("parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3, not 0")
    if parallel.pipeline > 1 and parallel.zero_stage != 1:
        reason = (
            "replicates the optimizer's state for nothing"
            if parallel.zero_stage == 0
            else "would reduce or gather parameters at every micro-batch, while the stages of a pipeline are at "
            "different ones"
        )
        problems.append(
            f"parallel.pipeline {parallel.pipeline} needs parallel.zero_stage 1: "
            f"stage {parallel.zero_stage} {reason}"
        )
    if parallel.pipeline > len(kinds):
        problems.append(
            f"parallel.pipeline {parallel.pipeline} exceeds the model's {len(kinds)} units "
            f"({', '.join(dict.fromkeys(kinds))}); use at most {len(kinds)} stages"
        )
    split = parallel.stage_units
    if split and (len(split) != parallel.pipeline or sum(split) != len(kinds) or min(split) < 1):
        problems.append(
            f"parallel.stage_units {list(split)} must be {parallel.pipeline} numbers (parallel.pipeline) of at "
            f"least 1 that sum to the model's {len(kinds)} units: {_counted(kinds)}"
        )
    return problems


def _counted(kinds: tuple[str, ...]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def length_problems(config: RunConfig, length_tokens: int) -> list[str]:
    """What the layout needs of the data's sequence length."""
    parallel = config.parallel
    if not parallel.sequence_parallel or isinstance(config.model, VQModelConfig):
        return []
    length = length_tokens - (config.objective.kind == "autoregressive")  # the last one is only a target
    objective = config.objective
    feeds_two = objective.kind == "complementary_mdlm" or (
        isinstance(objective, D3PMObjectiveConfig) and not objective.substitution
    )
    copies = 2 if feeds_two else 1
    rows = config.training.micro_batch_sequences * copies
    return [
        f"parallel.sequence_parallel: the {rows * tokens} tokens of a micro-batch ({rows} x {tokens}) are "
        f"not divisible by parallel.tensor {parallel.tensor}; change training.micro_batch_sequences"
        for tokens in shared_tokens(config.model, length)
        if rows * tokens % parallel.tensor
    ]


def shared_tokens(model: TransformerConfig, length: int) -> list[int]:
    """How many tokens each stream of a sequence has, which sequence parallelism shares out one by one."""
    return sorted({stream_rows(model, kind, length) for kind in ("group_swap", "output")})


def describe_layout(config: RunConfig, world_size: int, vocab_size: int, stage_units: Sequence[int]) -> str:
    """One line for people: who shares what, and what had to be padded."""
    parallel = config.parallel
    line = (
        f"layout: tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
        f"{data_parallel_ranks(config, world_size)}, ZeRO-{parallel.zero_stage}"
    )
    if parallel.sequence_parallel:
        line += ", sequence-parallel"
    if stage_units:
        line += f"; stages of {', '.join(map(str, stage_units))} units"
    padding = -vocab_size % parallel.tensor
    if padding:
        line += f"; the vocabulary of {vocab_size} is padded by {padding} row(s) at its end"
    return line
