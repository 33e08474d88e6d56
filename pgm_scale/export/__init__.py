"""From a trained model to a folder that others can load (`pgm_scale.model_folder` says what is in it)."""

from __future__ import annotations

from pgm_scale.export.folder import write_model_folder

__all__ = ["write_model_folder"]
