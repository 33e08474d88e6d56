"""`pgm-scale distill`: the model of a distillation is its teacher's, unless the configuration gives one."""

from __future__ import annotations

from typing import Any

from pgm_scale import config as configuration
from pgm_scale.config import ModelConfig
from pgm_scale.errors import UserError
from pgm_scale.model_folder import is_model_folder, read_description
from pgm_scale.run_folder import RunFolder


def fill_in_model(tree: dict[str, Any]) -> None:
    """Add `model` to a configuration's mapping; a run that has begun no longer needs its teacher's folder.

    Raises:
        UserError: no distillation, or no such teacher.
    """
    objective = tree.get("objective")
    if not isinstance(objective, dict) or objective.get("kind") != "sdtt":
        raise UserError(
            "distill needs a configuration with objective.kind sdtt; use `pgm-scale train` for others"
        )
    folder, teacher = tree.get("folder"), objective.get("teacher")
    if "model" in tree or not isinstance(teacher, str) or not isinstance(folder, str):
        return  # what is missing or of a wrong type is told when all of it is checked
    run = RunFolder(folder)
    begun = run.identity_path.exists()
    tree["model"] = configuration.to_mapping(run.config().model if begun else _model(teacher))


def _model(teacher: str) -> ModelConfig:
    return read_description(teacher).model if is_model_folder(teacher) else RunFolder(teacher).config().model
