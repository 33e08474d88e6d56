"""The configuration of a run: typed to the leaves, YAML file < dotted overrides, every problem at once.

A section is a frozen dataclass; a section that comes in several kinds (the model, the objective) is a union
whose members are told apart by their `kind`. `load` raises one `UserError` that lists every unknown key (with
the nearest known name), every wrong type and every impossible combination, before anything else has started.
"""

from __future__ import annotations

from pgm_scale.config.checks import (
    QUIRKS,
    cautions,
    inconsistencies,
    out_of_range,
)
from pgm_scale.config.loading import (
    load,
)
from pgm_scale.config.models import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    ModelConfig,
    PartitionTransformerConfig,
    TransformerConfig,
    VQModelConfig,
)
from pgm_scale.config.objectives import (
    AutoregressiveObjectiveConfig,
    ComplementaryMDLMObjectiveConfig,
    D3PMObjectiveConfig,
    ImagePGMObjectiveConfig,
    MaskGITObjectiveConfig,
    MaskSchedule,
    MDLMObjectiveConfig,
    ObjectiveConfig,
    PGMObjectiveConfig,
    SDTTObjectiveConfig,
    VQObjectiveConfig,
    likelihood_objective,
)
from pgm_scale.config.parsing import (
    parse,
    to_mapping,
    to_yaml,
)
from pgm_scale.config.reading import (
    read_yaml,
)
from pgm_scale.config.sections import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SamplerConfig,
    StabilityConfig,
    TrackingConfig,
    TrainingConfig,
    ValidationConfig,
    WatchingConfig,
)
from pgm_scale.config.sizes import (
    MODEL_SIZES,
)

__all__ = [
    "MODEL_SIZES",
    "QUIRKS",
    "AutoregressiveObjectiveConfig",
    "AutoregressiveTransformerConfig",
    "CheckpointConfig",
    "ComplementaryMDLMObjectiveConfig",
    "D3PMObjectiveConfig",
    "DataConfig",
    "DiffusionTransformerConfig",
    "ImagePGMObjectiveConfig",
    "MDLMObjectiveConfig",
    "MaskGITObjectiveConfig",
    "MaskGITTransformerConfig",
    "MaskSchedule",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PGMObjectiveConfig",
    "ParallelConfig",
    "PartitionTransformerConfig",
    "RunConfig",
    "SDTTObjectiveConfig",
    "SamplerConfig",
    "StabilityConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TransformerConfig",
    "VQModelConfig",
    "VQObjectiveConfig",
    "ValidationConfig",
    "WatchingConfig",
    "cautions",
    "inconsistencies",
    "likelihood_objective",
    "load",
    "out_of_range",
    "parse",
    "read_yaml",
    "to_mapping",
    "to_yaml",
]
