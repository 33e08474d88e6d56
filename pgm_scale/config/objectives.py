"""The objectives of a run, one class a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pgm_scale.config.models import ModelConfig, PartitionTransformerConfig


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


@dataclass(frozen=True, kw_only=True)
class SDTTObjectiveConfig:
    """Self-distillation through time of a PGM or an MDLM, in rounds that halve its steps (FACTS 5).

    Attributes:
        teacher: run folder or exported folder: the first round's teacher, and the student's initial weights.
        groups: of a PGM, `one` distils the masked tokens as published, `two` those of both groups in one pass.
        sampling_steps: of the first teacher; round r distils two steps of sampling_steps / 2**r into one.
        next_teacher: whose weights at the end of a round teach in the next one.
    """

    kind: Literal["sdtt"] = "sdtt"
    teacher: str
    teacher_weights: Literal["ema", "weight"] = "ema"
    divergence: Literal["reverse_kl", "forward_kl", "mse", "tvd"] = "reverse_kl"
    groups: Literal["one", "two"] = "one"
    sampling_steps: int = 1024
    round_steps: int = 10_000
    next_teacher: Literal["student", "ema"] = "student"
    reset_optimizer: bool = False  # at the start of each round but the first
    reset_ema: bool = False
    minimum_time: float = 1e-5


ObjectiveConfig = (
    PGMObjectiveConfig
    | MDLMObjectiveConfig
    | ComplementaryMDLMObjectiveConfig
    | D3PMObjectiveConfig
    | AutoregressiveObjectiveConfig
    | ImagePGMObjectiveConfig
    | MaskGITObjectiveConfig
    | VQObjectiveConfig
    | SDTTObjectiveConfig
)


def likelihood_objective(objective: ObjectiveConfig, model: ModelConfig) -> ObjectiveConfig:
    """The objective that a model is validated by: of a distilled one, that of its pretraining."""
    if not isinstance(objective, SDTTObjectiveConfig):
        return objective
    return PGMObjectiveConfig() if isinstance(model, PartitionTransformerConfig) else MDLMObjectiveConfig()
