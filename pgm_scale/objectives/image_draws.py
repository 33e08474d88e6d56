"""What the objectives of images draw: which codes are hidden, and which classes (FACTS 2.2).

A code is hidden with probability r', which a mask schedule makes of a uniform number, one an image. In training the
class of an image is left out now and then, for classifier-free guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pgm_scale.config import ImagePGMObjectiveConfig, MaskGITObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import bernoulli_mask, sequential_uniform, stratified_uniform, uniforms
from pgm_scale.diffusion.mask_schedules import mask_ratio
from pgm_scale.errors import UserError
from pgm_scale.objectives.base import DrawSpec, scorable

BOS_TOKENS = 1  # in front of the codes
Config = ImagePGMObjectiveConfig | MaskGITObjectiveConfig


@dataclass(frozen=True)
class ImageDraws:
    """bool [B, K], the hidden codes of each image, and int64 [B], its class, `num_classes` for none."""

    hidden_BK: np.ndarray
    labels_B: np.ndarray


def training_draws(batch: TokenBatch, spec: DrawSpec, config: Config, num_classes: int) -> ImageDraws:
    """Ratios stratified over the global batch; each class is left out with probability `label_drop`."""
    numbers_B = batch.sample_numbers_B
    u_B = stratified_uniform(spec.seed, numbers_B, spec.global_batch_sequences, "training/time")
    hidden_BK = _hidden(batch, u_B, spec.seed, "training/partition", config)
    is_dropped_B = uniforms(spec.seed, numbers_B, "training/label", 1)[:, 0] < config.label_drop
    return ImageDraws(hidden_BK, np.where(is_dropped_B, num_classes, class_labels(batch, num_classes)))


def validation_draws(batch: TokenBatch, spec: DrawSpec, config: Config, num_classes: int) -> ImageDraws:
    """Draws that depend on (seed, sample number) alone, with every label."""
    u_B = sequential_uniform(spec.seed, batch.sample_numbers_B, "validation/time")
    hidden_BK = _hidden(batch, u_B, spec.seed, "validation/partition", config)
    return ImageDraws(hidden_BK, class_labels(batch, num_classes))


def _hidden(batch: TokenBatch, u_B: np.ndarray, seed: int, stream: str, config: Config) -> np.ndarray:
    codes = batch.tokens_BL.shape[1] - BOS_TOKENS
    return bernoulli_mask(seed, batch.sample_numbers_B, stream, mask_ratio(config.mask_schedule, u_B), codes)


def scored_codes(batch: TokenBatch, vocabulary: Vocabulary) -> np.ndarray:
    """bool [B, K]: the codes in the loss, all of them but for a mask id in the data."""
    return scorable(batch, vocabulary)[:, BOS_TOKENS:]


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
