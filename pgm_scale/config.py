"""The configuration of a run: typed to the leaves, YAML file < dotted overrides, every problem at once.

A section is a frozen dataclass; a section that comes in several kinds (the model, the objective) is a union
whose members are told apart by their `kind`. `load` raises one `UserError` that lists every unknown key (with
the nearest known name), every wrong type and every impossible combination, before anything else has started.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pgm_scale.errors import UserError


@dataclass(frozen=True)
class PartitionTransformerConfig:
    """Partition Transformer (FACTS 1): group-wise encoder, GroupSwap, cross-attention decoder."""

    kind: Literal["partition_transformer"] = "partition_transformer"
    hidden_size: int = 768
    num_heads: int = 12
    num_encoder_blocks: int = 8
    num_decoder_blocks: int = 8
    condition_size: int = 128
    dropout: float = 0.1
    group_swap_query: Literal["learn", "learn+freqs", "learn+freqs+mean", "learn+freqs+logsumexp"] = (
        "learn+freqs"
    )
    group_swap_processor: Literal["linear", "mlp4"] = "linear"
    num_classes: int = 0  # above 0 the condition is an embedding of the class, not of the time (FACTS 2.1)
    registers: int = 0  # learned tokens without content, half of them in each group


@dataclass(frozen=True)
class DiffusionTransformerConfig:
    """MDLM's bidirectional transformer; `time_conditioned` feeds sigma instead of the constant 0."""

    kind: Literal["diffusion_transformer"] = "diffusion_transformer"
    hidden_size: int = 768
    num_heads: int = 12
    num_blocks: int = 12
    condition_size: int = 128
    dropout: float = 0.1
    time_conditioned: bool = False


@dataclass(frozen=True)
class AutoregressiveTransformerConfig:
    """Causal transformer without adaptive norms."""

    kind: Literal["autoregressive_transformer"] = "autoregressive_transformer"
    hidden_size: int = 768
    num_heads: int = 12
    num_blocks: int = 12
    dropout: float = 0.1


@dataclass(frozen=True)
class MaskGITTransformerConfig:
    """Halton-MaskGIT's bidirectional transformer over VQ codes of a class (FACTS 2.1)."""

    kind: Literal["maskgit_transformer"] = "maskgit_transformer"
    hidden_size: int = 1024
    num_heads: int = 16
    num_blocks: int = 24
    dropout: float = 0.1
    num_classes: int = 1000
    registers: int = 1


@dataclass(frozen=True)
class VQModelConfig:
    """LlamaGen's VQ autoencoder (FACTS 9): one factor of 2 less than `channel_multipliers` a side."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = 16_384
    code_size: int = 8
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    image_channels: int = 3


TransformerConfig = (
    PartitionTransformerConfig
    | DiffusionTransformerConfig
    | AutoregressiveTransformerConfig
    | MaskGITTransformerConfig
)
ModelConfig = TransformerConfig | VQModelConfig


def _pgm_size(encoder: int, decoder: int, hidden: int, head: int = 64) -> dict[str, Any]:
    return {
        "kind": "partition_transformer",
        "hidden_size": hidden,
        "num_heads": hidden // head,
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
    }


def _stack_size(kind: str, blocks: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"kind": kind, "hidden_size": hidden, "num_heads": heads, "num_blocks": blocks}


def _image_pgm_size(encoder: int, decoder: int) -> dict[str, Any]:
    return _pgm_size(encoder, decoder, 1024) | {"condition_size": 1024, "num_classes": 1000, "registers": 2}


# `model.size` names one of these; keys given beside it win. Heads are 64 wide, but for SDTT's 24 x 1536.
MODEL_SIZES: dict[str, dict[str, Any]] = {
    **{f"pgm-{e}-{m}-{h}": _pgm_size(e, m, h) for e, m, h in [(6, 6, 768), (8, 8, 768), (6, 6, 1024)]},
    **{f"pgm-{e}-{m}-{h}": _pgm_size(e, m, h) for e, m, h in [(8, 4, 768), (10, 2, 768), (4, 8, 768)]},
    "pgm-10-6-768": _pgm_size(10, 6, 768),
    # By their parameters with 50,258 tokens: 202,708,818; 1,261,921,618; 7,024,895,314; 30,791,920,978;
    # 69,277,648,210. The widths and depths are those of language models of these sizes, in heads of 128.
    "pgm-0.2b": _pgm_size(8, 8, 768),
    "pgm-1.3b": _pgm_size(10, 10, 2048, head=128),
    "pgm-7b": _pgm_size(16, 16, 4096, head=128),
    "pgm-30b": _pgm_size(24, 24, 7168, head=128),
    "pgm-70b": _pgm_size(42, 42, 8192, head=128),
    "mdlm-12-768": _stack_size("diffusion_transformer", 12, 768, 12),
    "mdlm-24-1024": _stack_size("diffusion_transformer", 24, 1024, 16),
    "mdlm-24-1536": _stack_size("diffusion_transformer", 24, 1536, 24),
    "ar-12-768": _stack_size("autoregressive_transformer", 12, 768, 12),
    "image-pgm-12-12": _image_pgm_size(12, 12),
    "image-pgm-14-10": _image_pgm_size(14, 10),
    "maskgit-tiny": _stack_size("maskgit_transformer", 6, 384, 6),
    # The published 6 heads do not divide a width of 512; the parameters' shapes are the same with 8.
    "maskgit-small": _stack_size("maskgit_transformer", 12, 512, 8),
    "maskgit-base": _stack_size("maskgit_transformer", 12, 768, 12),
    "maskgit-large": _stack_size("maskgit_transformer", 24, 1024, 16),
    "maskgit-xlarge": _stack_size("maskgit_transformer", 28, 1152, 16),
    "vq-8": {"kind": "vq", "channel_multipliers": (1, 2, 2, 4)},
    "vq-16": {"kind": "vq", "channel_multipliers": (1, 1, 2, 2, 4)},
}


@dataclass(frozen=True)
class PGMObjectiveConfig:
    """Partition objective; the forms are derived in `pgm_scale.objectives.pgm` (FACTS 3.4)."""

    kind: Literal["pgm"] = "pgm"
    form: Literal["published", "bounded", "count"] = "count"
    minimum_time: float = 1e-3


@dataclass(frozen=True)
class MDLMObjectiveConfig:
    """Masked diffusion NELBO (FACTS 3.2). `diffusion_steps` 0 is continuous time."""

    kind: Literal["mdlm"] = "mdlm"
    diffusion_steps: int = 0
    loss: Literal["elbo", "low_variance"] = "elbo"
    minimum_time: float = 1e-3


@dataclass(frozen=True)
class ComplementaryMDLMObjectiveConfig:
    """Masked diffusion on a mask and its complement, 2 rows a sequence (FACTS 3.3)."""

    kind: Literal["complementary_mdlm"] = "complementary_mdlm"
    minimum_time: float = 1e-3


@dataclass(frozen=True)
class D3PMObjectiveConfig:
    """D3PM with the absorbing state (FACTS 3.5); `substitution` removes the mask's own probability."""

    kind: Literal["d3pm"] = "d3pm"
    diffusion_steps: int = 1000
    substitution: bool = False
    cross_entropy_weight: float = 0.0


@dataclass(frozen=True)
class AutoregressiveObjectiveConfig:
    """Next-token cross-entropy (FACTS 3.6)."""

    kind: Literal["autoregressive"] = "autoregressive"


MaskSchedule = Literal["arccos", "root", "linear", "square", "cosine"]


@dataclass(frozen=True)
class ImagePGMObjectiveConfig:
    """Unweighted cross-entropy of all codes, each predicted from the other group (FACTS 2.2)."""

    kind: Literal["image_pgm"] = "image_pgm"
    mask_schedule: MaskSchedule = "arccos"
    label_drop: float = 0.1  # share of samples trained without their class, for classifier-free guidance


@dataclass(frozen=True)
class MaskGITObjectiveConfig:
    """Unweighted cross-entropy of all codes, a part of which is masked (FACTS 2.2)."""

    kind: Literal["maskgit"] = "maskgit"
    mask_schedule: MaskSchedule = "arccos"
    label_drop: float = 0.1


@dataclass(frozen=True)
class VQObjectiveConfig:
    """Squared error of the reconstruction, and of features and their codes, which are pulled together."""

    kind: Literal["vq"] = "vq"
    commitment_weight: float = 0.25


ObjectiveConfig = (
    PGMObjectiveConfig
    | MDLMObjectiveConfig
    | ComplementaryMDLMObjectiveConfig
    | D3PMObjectiveConfig
    | AutoregressiveObjectiveConfig
    | ImagePGMObjectiveConfig
    | MaskGITObjectiveConfig
    | VQObjectiveConfig
)

_MODEL_OF_OBJECTIVE = {
    "pgm": "partition_transformer",
    "mdlm": "diffusion_transformer",
    "complementary_mdlm": "diffusion_transformer",
    "d3pm": "diffusion_transformer",
    "autoregressive": "autoregressive_transformer",
    "image_pgm": "partition_transformer",
    "maskgit": "maskgit_transformer",
    "vq": "vq",
}


@dataclass(frozen=True)
class DataConfig:
    """Split folders (local, s3:// or gs://) that hold a dataset.json; remote shards are cached locally."""

    train: str
    validation: str
    cache_folder: str | None = None
    shuffle_block_shards: int = (
        8  # rows are shuffled within this many shards, which is what a rank keeps open
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; `cosine` and `linear` fall to `final_ratio` at the last step."""

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip_norm: float = 1.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 2500
    decay_share: float = 1.0  # the last share of the steps, over which `cosine` and `linear` fall
    final_ratio: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 1_000_000
    global_batch_sequences: int = 512
    micro_batch_sequences: int = 32  # per data-parallel rank and forward pass
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute_blocks: bool = False  # keep only the blocks' inputs, and compute a third more
    seed: int = 1
    ema_decay: float = 0.9999
    log_interval_steps: int = 10


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work; data-parallel ranks are world size / (tensor x pipeline)."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False  # tensor ranks also share the tokens of norms, residuals and dropout
    stage_units: tuple[int, ...] = ()  # units of each pipeline stage; empty: split by measured cost
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # DeepSpeed's ZeRO-Offload: the optimizer's state lives in host memory
    timeout_s: float = 600.0  # without progress for as long, a run names the rank that hangs, and ends


@dataclass(frozen=True)
class CheckpointConfig:
    interval_steps: int = 1000
    keep_last: int = 3
    milestone_interval_steps: int = 0  # steps divisible by it are kept for ever; 0 keeps none
    asynchronous: bool = True  # train while it is written, from a copy on the host (16 bytes/parameter)


# `sampler.quirks`: the model that has it, and the samplers.
QUIRKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "register_offset": ("partition_transformer", ("halton", "confidence")),
    "dropout": ("partition_transformer", ("confidence",)),
    "resampled_tokens": ("maskgit_transformer", ("halton",)),
}


@dataclass(frozen=True)
class SamplerConfig:
    """How to generate; which kinds fit which model is said by `pgm_scale.sampling`."""

    kind: Literal[
        "pgm_uniform",
        "pgm_non_uniform",
        "pgm_naive",
        "ancestral",
        "ancestral_cached",
        "analytic",
        "autoregressive",
        "halton",
        "confidence",
    ] = "pgm_uniform"
    steps: int = 128
    temperature: float = 1.0
    temperature_warmup_steps: int = 0  # the first steps, in which the temperature is twice as high
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    guidance: float = 0.0  # classifier-free, w: logits are (1 + w) those of the class - w those of none
    guidance_schedule: Literal["constant", "linear"] = "linear"  # linear: from 0 at the first step to w
    choice_temperature: float = 5.0  # of the noise by which `confidence` chooses the positions to decode
    # Deviations of the published image samplers, only to reproduce their numbers (FACTS 8.14 to 8.16).
    quirks: tuple[Literal["register_offset", "dropout", "resampled_tokens"], ...] = ()


@dataclass(frozen=True)
class ValidationConfig:
    """Validation with EMA weights and fixed draws, at most `sequences` of the split, every interval."""

    interval_steps: int = 20_000
    sequences: int = 2048
    samples: int = 2  # sequences generated and written beside each validation; 0 is off


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases; the JSONL log is always written."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "pgm-scale"
    entity: str | None = None


@dataclass(frozen=True)
class RunConfig:
    folder: str
    data: DataConfig
    name: str = "run"
    model: ModelConfig = field(default_factory=PartitionTransformerConfig)
    objective: ObjectiveConfig = field(default_factory=PGMObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    check: Callable[[RunConfig], list[str]] = lambda _: [],
) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides; `check` may add problems of its own.

    Raises:
        UserError: the file cannot be read, or one line for each problem in it.
    """
    tree = read_yaml(path)
    problems: list[str] = []
    for override in sorted(overrides, key=lambda text: not text.startswith("model.size=")):
        _apply_override(tree, override, problems)
    config = parse(RunConfig, tree, problems)
    if config is not None and not problems:
        problems += inconsistencies(config) + check(config)
    if config is None or problems:
        raise UserError(
            f"{path}: {len(problems)} problem(s) in the configuration:\n  " + "\n  ".join(problems)
        )
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from disk, or a one-line `UserError`."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; give a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top, found {type(tree).__name__}")
    return tree


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain containers, as written to YAML; `parse` of the result gives the same config back."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    } | {
        f.name: to_mapping(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, f.name))
    }


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def parse(cls: type, tree: Any, problems: list[str], where: str = "") -> Any:
    """Build the dataclass `cls` from plain containers, adding a line to `problems` for each fault."""
    if not isinstance(tree, Mapping):
        problems.append(f"{where or 'top level'}: expected a mapping, found {tree!r}")
        return None
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    for key in tree:
        if key not in known:
            problems.append(f"{_join(where, key)}: unknown key{_nearest(str(key), known)}")
    values = {}
    for name, spec in known.items():
        if name in tree:
            values[name] = _parse_value(hints[name], tree[name], problems, _join(where, name))
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(where, name)}: required, but missing")
    return cls(**values) if len(problems) == before else None


def _parse_value(hint: Any, value: Any, problems: list[str], where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        members = [a for a in arguments if a is not type(None)]
        if len(members) > 1 and all(dataclasses.is_dataclass(member) for member in members):
            return _parse_kind(members, value, problems, where)
        return _parse_value(members[0], value, problems, where)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, problems, where)
    if origin is Literal:
        if value in arguments and any(type(value) is type(a) for a in arguments):
            return value
        choices = ", ".join(str(a) for a in arguments)
        problems.append(
            f"{where}: {value!r} is not one of {choices}{_nearest(str(value), map(str, arguments))}"
        )
        return None
    if origin is tuple:
        if arguments[-1] is Ellipsis and isinstance(value, (list, tuple)):
            arguments = arguments[:1] * len(value)
        if isinstance(value, (list, tuple)) and len(value) == len(arguments):
            return tuple(
                _parse_value(a, v, problems, f"{where}[{i}]")
                for i, (a, v) in enumerate(zip(arguments, value, strict=True))
            )
        count = "a list of" if Ellipsis in arguments else len(arguments)
        problems.append(f"{where}: expected {count} values, found {value!r}")
        return None
    return _parse_scalar(hint, value, problems, where)


def _parse_kind(members: list[Any], value: Any, problems: list[str], where: str) -> Any:
    """Choose the union's member by `kind`; `size` stands for the keys of a named model."""
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a mapping, found {value!r}")
        return None
    tree = dict(value)
    size = tree.pop("size", None) if where == "model" else None
    if size is not None:
        if not isinstance(size, str) or size not in MODEL_SIZES:
            problems.append(f"{where}.size: unknown size {size!r}{_nearest(str(size), MODEL_SIZES)}")
            return None
        tree = MODEL_SIZES[size] | tree
    by_kind = {typing.get_args(typing.get_type_hints(m)["kind"])[0]: m for m in members}
    kind = tree.get("kind", next(iter(by_kind)))
    if not isinstance(kind, str) or kind not in by_kind:
        problems.append(
            f"{where}.kind: {kind!r} is not one of {', '.join(by_kind)}{_nearest(str(kind), by_kind)}"
        )
        return None
    return parse(by_kind[kind], tree, problems, where)


def _parse_scalar(hint: Any, value: Any, problems: list[str], where: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    problems.append(f"{where}: expected {hint.__name__}, found {value!r}")
    return None


def _apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        problems.append(f"override {override!r}: expected section.key=value")
        return
    *sections, key = path.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            problems.append(f"override {override!r}: {section} is a value, not a section")
            return
        tree = child
    try:
        tree[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        tree[key] = text
    if (sections, key) == (["model"], "size"):
        # It must win over the keys that the file gives; overrides of these come after it.
        for named in MODEL_SIZES.get(str(tree[key]), {}):
            tree.pop(named, None)


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
    needed = _MODEL_OF_OBJECTIVE[config.objective.kind]
    if model.kind != needed:
        problems.append(f"objective.kind {config.objective.kind} needs model.kind {needed}, not {model.kind}")
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


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
