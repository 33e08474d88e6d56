"""The model of a distillation is its teacher's, but for what the configuration says of it."""

from __future__ import annotations

from typing import Any

from pgm_scale import config as configuration
from pgm_scale.config import ModelConfig
from pgm_scale.errors import UserError


def fill_in_model(tree: dict[str, Any]) -> None:
    """Complete `model` in the mapping of a distillation; other configurations stay as they are.

    A run that has begun no longer needs its teacher's folder, nor does a model that is given with its kind or size.

    Raises:
        UserError: no such teacher.
    """
    objective, given = tree.get("objective"), tree.get("model", {})
    if not isinstance(objective, dict) or objective.get("kind") != "sdtt" or not isinstance(given, dict):
        return
    folder, teacher = tree.get("folder"), objective.get("teacher")
    if given.keys() & {"kind", "size"} or not isinstance(teacher, str) or not isinstance(folder, str):
        return  # what is missing or of a wrong type is told when all of it is checked
    # It imports torch, for which `pgm-scale config` of other runs need not wait.
    from pgm_scale.run_folder import RunFolder

    run = RunFolder(folder)
    begun = run.identity_path.exists()
    tree["model"] = configuration.to_mapping(run.config().model if begun else _model(teacher)) | given


def _model(teacher: str) -> ModelConfig:
    from pgm_scale.model_folder import is_model_folder, read_description
    from pgm_scale.run_folder import RunFolder

    if is_model_folder(teacher):
        return read_description(teacher).model
    run = RunFolder(teacher)
    if "://" in teacher:
        raise UserError(f"objective.teacher: {teacher} is not on this machine; copy the folder here")
    if not run.config_path.exists():
        raise UserError(
            f"objective.teacher: {teacher} is neither a run nor an exported folder; train or convert it first, or, "
            "to look at the configuration alone, give the model too (model.size=...)"
        )
    return run.config().model
