"""Classes of a batch of images, and which of them training leaves out, for classifier-free guidance (FACTS 2.2)."""

from __future__ import annotations

import numpy as np

from pgm_scale.data.batch import TokenBatch
from pgm_scale.diffusion.draws import uniforms
from pgm_scale.errors import UserError
from pgm_scale.objectives.base import DrawSpec


def class_labels(batch: TokenBatch, num_classes: int) -> np.ndarray:
    """int64 [B]: the class of each sequence.

    Raises:
        UserError: the data have no labels, or labels beyond the model's classes.
    """
    if batch.labels_B is None:
        raise UserError(
            "the model is conditioned on classes, but the data have no labels; give data.train and "
            "data.validation that `pgm-scale prepare imagenet-vq` has written"
        )
    if batch.labels_B.min() < 0 or batch.labels_B.max() >= num_classes:
        raise UserError(
            f"the data have labels from {batch.labels_B.min()} to {batch.labels_B.max()}, but "
            f"model.num_classes is {num_classes}; set it to the number of classes of the data"
        )
    return batch.labels_B


def training_labels(batch: TokenBatch, spec: DrawSpec, label_drop: float, num_classes: int) -> np.ndarray:
    """int64 [B]: `class_labels`, each replaced by "no class", `num_classes`, with probability `label_drop`."""
    is_dropped_B = uniforms(spec.seed, batch.sample_numbers_B, "training/label", 1)[:, 0] < label_drop
    return np.where(is_dropped_B, num_classes, class_labels(batch, num_classes))
