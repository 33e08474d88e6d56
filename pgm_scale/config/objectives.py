"""The objectives of a run, one class a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
