"""Objectives, one file each; `build_objective` picks by the config, `base` says what an objective is."""

from __future__ import annotations

from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    ComplementaryMDLMObjectiveConfig,
    D3PMObjectiveConfig,
    ImagePGMObjectiveConfig,
    MaskGITObjectiveConfig,
    MaskGITTransformerConfig,
    MDLMObjectiveConfig,
    ModelConfig,
    ObjectiveConfig,
    PartitionTransformerConfig,
    PGMObjectiveConfig,
    SDTTObjectiveConfig,
    VQObjectiveConfig,
    likelihood_objective,
)
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.objectives.autoregressive import AutoregressiveObjective
from pgm_scale.objectives.base import DrawSpec, LossTerms, ModelCall, Objective, loss_terms
from pgm_scale.objectives.complementary_mdlm import ComplementaryMDLMObjective
from pgm_scale.objectives.d3pm import D3PMObjective
from pgm_scale.objectives.image_pgm import ImagePGMObjective
from pgm_scale.objectives.maskgit import MaskGITObjective
from pgm_scale.objectives.mdlm import MDLMObjective
from pgm_scale.objectives.pgm import PGMObjective
from pgm_scale.objectives.sdtt import SDTTObjective
from pgm_scale.objectives.vq import VQObjective

__all__ = ["DrawSpec", "LossTerms", "ModelCall", "Objective", "build_objective", "loss_terms"]


def build_objective(
    config: ObjectiveConfig, vocabulary: Vocabulary, model: ModelConfig | None = None
) -> Objective:
    """The objective that a config section names; those of images need to know the model's classes and registers."""
    match config:
        case ImagePGMObjectiveConfig():
            assert isinstance(model, PartitionTransformerConfig), model
            return ImagePGMObjective(config, vocabulary, model.num_classes, model.registers)
        case MaskGITObjectiveConfig():
            assert isinstance(model, MaskGITTransformerConfig), model
            return MaskGITObjective(config, vocabulary, model.num_classes)
        case SDTTObjectiveConfig():
            assert model is not None
            likelihood = build_objective(likelihood_objective(config, model), vocabulary, model)
            assert isinstance(likelihood, PGMObjective | MDLMObjective), likelihood
            return SDTTObjective(config, vocabulary, likelihood)
        case PGMObjectiveConfig():
            return PGMObjective(config, vocabulary)
        case MDLMObjectiveConfig():
            return MDLMObjective(config, vocabulary)
        case ComplementaryMDLMObjectiveConfig():
            return ComplementaryMDLMObjective(config, vocabulary)
        case D3PMObjectiveConfig():
            return D3PMObjective(config, vocabulary)
        case AutoregressiveObjectiveConfig():
            return AutoregressiveObjective(config, vocabulary)
        case VQObjectiveConfig():
            return VQObjective(config)
