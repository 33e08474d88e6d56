"""Objectives, one file each; `build_objective` picks by the config, `base` says what an objective is."""

from __future__ import annotations

from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    ComplementaryMDLMObjectiveConfig,
    D3PMObjectiveConfig,
    MDLMObjectiveConfig,
    ObjectiveConfig,
    PGMObjectiveConfig,
)
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.objectives.autoregressive import AutoregressiveObjective
from pgm_scale.objectives.base import DrawSpec, LossTerms, ModelCall, Objective, loss_terms
from pgm_scale.objectives.complementary_mdlm import ComplementaryMDLMObjective
from pgm_scale.objectives.d3pm import D3PMObjective
from pgm_scale.objectives.mdlm import MDLMObjective
from pgm_scale.objectives.pgm import PGMObjective

__all__ = ["DrawSpec", "LossTerms", "ModelCall", "Objective", "build_objective", "loss_terms"]


def build_objective(config: ObjectiveConfig, vocabulary: Vocabulary) -> Objective:
    """The objective that a config section names."""
    match config:
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
