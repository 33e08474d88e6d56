"""What tells one number of an evaluation from another: which weights made it, in which precision."""

from __future__ import annotations

from typing import Any, Literal

import torch

from pgm_scale.trained_model import TrainedModel

Precision = Literal["fp32", "bf16"]


def torch_dtype(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def model_record(trained: TrainedModel, precision: Precision) -> dict[str, Any]:
    """Of every part of a result, in plain JSON values."""
    description, origin = trained.description, trained.description.origin
    return {
        "run": str(trained.folder),
        "source": origin.source,
        "run_id": origin.run_id,
        "step": origin.step,
        "weights": origin.weights,
        "checkpoint_sha256": origin.checkpoint_sha256,
        "objective": description.objective.kind,
        "precision": precision,
    }
