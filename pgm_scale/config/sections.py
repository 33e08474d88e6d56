"""The sections of a run's configuration, and the whole of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pgm_scale.config.models import ModelConfig, PartitionTransformerConfig
from pgm_scale.config.objectives import ObjectiveConfig, PGMObjectiveConfig


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
class StabilityConfig:
    """What becomes of a step whose loss or gradient norm is not finite, or a spike.

    `stop` ends the run; `skip` leaves out its update; `roll_back` goes back to the newest checkpoint and then
    leaves out the data of the last steps up to it (PaLM, section 5.1).
    """

    on_non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    on_spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    spike_deviations: float = 6.0  # a spike is as many standard deviations above the mean ...
    spike_history_steps: int = 128  # ... of so many steps before it, at least half of which there must be
    roll_back_data_steps: int = 100  # of which the data are left out, if the checkpoint is as old
    most_per_1000_steps: int = 10  # such steps; one more ends the run


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
    strict: bool = (
        False  # refuse to go on when the newest one is bad, instead of falling back to an older one
    )


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
class WatchingConfig:
    """What a run tells others. The command runs by the shell on rank 0 and reads PGM_SCALE_EVENT (started,
    resumed, finished, preempted, skipped, rolled_back, unstable, hung, straggler, failed, crash_loop), _RUN, _STEP
    and _MESSAGE."""

    alert_command: str | None = None  # keep secrets out of it: it can read them from the environment
    # A rank's own seconds over those of its peers; one that is above it in three records in a row is named.
    slow_rank_ratio: float = 1.5
    prometheus_folder: str | None = None  # of node_exporter's textfile collector


@dataclass(frozen=True)
class RunConfig:
    folder: str
    data: DataConfig
    name: str = "run"
    model: ModelConfig = field(default_factory=PartitionTransformerConfig)
    objective: ObjectiveConfig = field(default_factory=PGMObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    watching: WatchingConfig = field(default_factory=WatchingConfig)
