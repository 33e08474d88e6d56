"""What a configuration's types cannot say: ranges, and values that do not go together."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pgm_scale.config.models import MaskGITTransformerConfig, PartitionTransformerConfig, VQModelConfig
from pgm_scale.config.objectives import SDTTObjectiveConfig
from pgm_scale.config.sections import RunConfig

_MODELS_OF_OBJECTIVE = {
    "pgm": ("partition_transformer",),
    "mdlm": ("diffusion_transformer",),
    "complementary_mdlm": ("diffusion_transformer",),
    "d3pm": ("diffusion_transformer",),
    "autoregressive": ("autoregressive_transformer",),
    "image_pgm": ("partition_transformer",),
    "maskgit": ("maskgit_transformer",),
    "vq": ("vq",),
    "sdtt": ("partition_transformer", "diffusion_transformer"),
}

# `sampler.quirks`: the model that has it, and the samplers.
QUIRKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "register_offset": ("partition_transformer", ("halton", "confidence")),
    "dropout": ("partition_transformer", ("confidence",)),
    "resampled_tokens": ("maskgit_transformer", ("halton",)),
}

# Least and greatest value of every number; a model or objective may not have all of them.
_AT_LEAST_ONE = (1, math.inf)
_FROM_ZERO = (0, math.inf)
_UP_TO_ONE = (0.0, 1.0)
_TINY = 1e-300  # above 0
_RANGES: dict[str, tuple[float, float]] = {
    "data.shuffle_block_shards": _AT_LEAST_ONE,
    "model.hidden_size": _AT_LEAST_ONE,
    "model.num_heads": _AT_LEAST_ONE,
    "model.num_encoder_blocks": _FROM_ZERO,
    "model.num_decoder_blocks": _FROM_ZERO,
    "model.num_blocks": _FROM_ZERO,
    "model.condition_size": _AT_LEAST_ONE,
    "model.dropout": (0.0, 0.999),
    "model.num_classes": _FROM_ZERO,
    "model.registers": _FROM_ZERO,
    "model.codebook_size": _AT_LEAST_ONE,
    "model.code_size": _AT_LEAST_ONE,
    "model.channels": _AT_LEAST_ONE,
    "model.num_res_blocks": _AT_LEAST_ONE,
    "model.z_channels": _AT_LEAST_ONE,
    "model.image_channels": _AT_LEAST_ONE,
    "objective.minimum_time": (0.0, 0.5),
    "objective.diffusion_steps": _FROM_ZERO,
    "objective.cross_entropy_weight": _FROM_ZERO,
    "objective.label_drop": (0.0, 1.0),
    "objective.commitment_weight": _FROM_ZERO,
    "objective.sampling_steps": (2, math.inf),
    "objective.round_steps": _AT_LEAST_ONE,
    "optimizer.learning_rate": (_TINY, 1e6),
    "optimizer.epsilon": (0.0, 1.0),
    "optimizer.weight_decay": (0.0, 1e6),
    "optimizer.gradient_clip_norm": (_TINY, 1e30),
    "optimizer.warmup_steps": _FROM_ZERO,
    "optimizer.decay_share": (_TINY, 1.0),
    "optimizer.final_ratio": _UP_TO_ONE,
    "training.steps": _AT_LEAST_ONE,
    "training.global_batch_sequences": _AT_LEAST_ONE,
    "training.micro_batch_sequences": _AT_LEAST_ONE,
    "training.seed": (0, 2**63 - 1),
    "training.ema_decay": (0.0, 0.9999999),
    "training.log_interval_steps": _AT_LEAST_ONE,
    "stability.spike_deviations": (_TINY, 1e6),
    "stability.spike_history_steps": (2, 100_000),
    "stability.roll_back_data_steps": _AT_LEAST_ONE,
    "stability.most_per_1000_steps": (0, 1000),
    "parallel.tensor": _AT_LEAST_ONE,
    "parallel.pipeline": _AT_LEAST_ONE,
    "parallel.timeout_s": (1.0, 1e6),
    "checkpoint.interval_steps": _AT_LEAST_ONE,
    "checkpoint.keep_last": _AT_LEAST_ONE,
    "checkpoint.milestone_interval_steps": _FROM_ZERO,
    "sampler.steps": _AT_LEAST_ONE,
    "sampler.temperature": (_TINY, 1e6),
    "sampler.top_p": (_TINY, 1.0),
    "sampler.top_k": _FROM_ZERO,
    "sampler.temperature_warmup_steps": _FROM_ZERO,
    "sampler.guidance": _FROM_ZERO,
    "sampler.choice_temperature": _FROM_ZERO,
    "validation.interval_steps": _AT_LEAST_ONE,
    "validation.sequences": _AT_LEAST_ONE,
    "validation.samples": _FROM_ZERO,
    "watching.slow_rank_ratio": (1.01, 1e6),
}


def out_of_range(section: str, values: Any) -> list[str]:
    """A line for each value of a section of the configuration, `values`, that is out of its range."""
    problems = []
    for name, (low, high) in _RANGES.items():
        value = getattr(values, name.removeprefix(f"{section}."), low)
        if not low <= value <= high or value == math.inf:  # so written, NaN fails
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            problems.append(f"{name}: {value} must be {bounds}")
    return problems


def inconsistencies(config: RunConfig) -> list[str]:
    """Values out of range, and what each key allows but their combination does not.

    What the parallel layout needs is checked by `parallel.layout.layout_problems`.
    """
    problems = []
    for section in dataclasses.fields(config):
        problems += out_of_range(section.name, getattr(config, section.name))
    for beta in config.optimizer.betas:
        if not 0 <= beta < 1:
            problems.append(f"optimizer.betas: {beta} must be at least 0 and below 1")
    model, training = config.model, config.training
    needed = _MODELS_OF_OBJECTIVE[config.objective.kind]
    if model.kind not in needed:
        problems.append(
            f"objective.kind {config.objective.kind} needs model.kind {' or '.join(needed)}, not {model.kind}"
        )
    if isinstance(config.objective, SDTTObjectiveConfig):
        problems += _distillation_inconsistencies(config, config.objective)
    if isinstance(model, VQModelConfig):
        problems += _vq_inconsistencies(model)
    elif model.num_heads > 0 and model.hidden_size % (2 * model.num_heads):
        problems.append(
            f"model.hidden_size {model.hidden_size} is not divisible by model.num_heads {model.num_heads} "
            "into heads of even size; change one of them"
        )
    problems += _image_inconsistencies(config)
    if (
        training.micro_batch_sequences > 0
        and training.global_batch_sequences % training.micro_batch_sequences
    ):
        problems.append(
            f"training.global_batch_sequences {training.global_batch_sequences} is not divisible by "
            f"micro_batch_sequences {training.micro_batch_sequences}; change one of them"
        )
    return problems


def cautions(config: RunConfig) -> list[str]:
    """What is allowed, but hardly meant."""
    steps, warmup = config.training.steps, config.optimizer.warmup_steps
    if warmup < steps:
        return []
    return [
        f"optimizer.warmup_steps {warmup} is not below training.steps {steps}: the learning rate never gets to its "
        "value; lower it"
    ]


def _distillation_inconsistencies(config: RunConfig, objective: SDTTObjectiveConfig) -> list[str]:
    problems = []
    if not objective.teacher:
        problems.append("objective.teacher: give a run folder or an exported folder")
    if objective.groups == "two" and not isinstance(config.model, PartitionTransformerConfig):
        problems.append("objective.groups: two needs model.kind partition_transformer; leave it at one")
    if getattr(config.model, "time_conditioned", False):
        problems.append(
            "model.time_conditioned: a time-conditioned model cannot be distilled; set it to false"
        )
    if objective.next_teacher == "ema" and config.training.ema_decay == 0:
        problems.append("objective.next_teacher: ema needs training.ema_decay above 0; use student")
    if objective.reset_ema and config.training.ema_decay == 0:
        problems.append(
            "objective.reset_ema: there is no average, as training.ema_decay is 0; set it to false"
        )
    if objective.round_steps > 0:
        rounds = -(-config.training.steps // objective.round_steps)
        if rounds >= objective.sampling_steps.bit_length():  # fewer sampling steps than 2**rounds
            problems.append(
                f"objective.sampling_steps: {objective.sampling_steps} cannot be halved in {rounds} rounds; "
                "use fewer training.steps or longer objective.round_steps"
            )
    return problems


def _vq_inconsistencies(model: VQModelConfig) -> list[str]:
    problems = []
    if not model.channel_multipliers or min(model.channel_multipliers) < 1:
        problems.append(
            f"model.channel_multipliers: {model.channel_multipliers} must be whole numbers of at least 1"
        )
    if model.channels % 32:
        problems.append(f"model.channels: {model.channels} must be divisible by 32, the groups of its norms")
    return problems


def _image_inconsistencies(config: RunConfig) -> list[str]:
    """What a model of images needs of itself, and of its objective."""
    model, problems = config.model, []
    if isinstance(model, PartitionTransformerConfig):
        if (config.objective.kind == "image_pgm") != (model.num_classes > 0):
            problems.append(
                f"objective.kind {config.objective.kind} and model.num_classes {model.num_classes} do not go "
                "together: image_pgm needs a class-conditional model, the others need num_classes 0"
            )
        if model.registers % 2 or (model.registers and not model.num_classes):
            problems.append(
                f"model.registers: {model.registers} must be even, and 0 without model.num_classes"
            )
    sampler, classes = config.sampler, getattr(model, "num_classes", 0)
    if not classes and (sampler.guidance or sampler.quirks or sampler.temperature_warmup_steps):
        problems.append(
            "sampler.guidance, sampler.quirks and sampler.temperature_warmup_steps are for models of classes; "
            "leave them out"
        )
    problems += [
        f"sampler.quirks: {quirk} is one of model.kind {model_kind} with sampler.kind {' or '.join(kinds)}; "
        "leave it out"
        for quirk, (model_kind, kinds) in QUIRKS.items()
        if classes and quirk in sampler.quirks and (model.kind != model_kind or sampler.kind not in kinds)
    ]
    if isinstance(model, MaskGITTransformerConfig) and model.num_classes < 1:
        problems.append(f"model.num_classes: {model.num_classes} must be at least 1")
    return problems
