"""Samples of a run's model by number: codes of an image are a function of the run, the settings and its number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.chunks import Columns
from pgm_scale.evaluation.images.sources import SplitImages
from pgm_scale.loading import load
from pgm_scale.sampling import class_count, fitting_sampler, known_prefixes, sample
from pgm_scale.sampling.request import check_choice_temperature
from pgm_scale.trained_model import TrainedModel

LabelOrder = Literal["reference", "balanced"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Labels:
    """The class of every sample number; `identity` says how they are chosen."""

    of: Callable[[np.ndarray], np.ndarray]
    identity: str


class ImageSampler:
    """A checkpoint of a run, and how to sample from it."""

    def __init__(
        self,
        folder: str,
        step: int,
        settings: dict[str, Any],
        seed: int,
        batch_images: int,
        weights: Literal["ema", "weight"],
        precision: Precision,
        device: torch.device,
    ) -> None:
        """`settings` are fields of SamplerConfig that replace the run's own.

        Raises:
            UserError: no run, no such checkpoint, not one of a class-conditional model of images, or a setting
                that its sampler has no use for.
        """
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.run: TrainedModel = load(folder, step=step, weights=weights, device=device, dtype=dtype)
        self.classes = class_count(self.run.model)
        if not self.classes:
            raise UserError(
                f"{folder} is not the run of a class-conditional model of images; give one of image_pgm or maskgit"
            )
        usual = fitting_sampler(self.run.description.sampler, self.run.model)
        self.config: SamplerConfig = dataclasses.replace(usual, **settings)
        check_choice_temperature(settings.get("choice_temperature"), self.config.kind)
        self._seed, self._batch_images, self._device = seed, batch_images, device
        self._precision = precision

    def identity(self, labels: Labels) -> dict[str, Any]:
        """What decides the codes, in plain JSON values; batch sizes do not."""
        origin = self.run.description.origin
        return {
            "run_id": origin.run_id,
            "step": origin.step,
            "weights": origin.weights,
            "checkpoint_sha256": origin.checkpoint_sha256,
            "precision": self._precision,
            "sampler": dataclasses.asdict(self.config),
            "seed": self._seed,
            "labels": labels.identity,
        }

    def labels(self, order: LabelOrder | None, reference: SplitImages | None) -> Labels:
        """In the order of the reference's rows, again from the first if there are more; or all classes in turn.

        Args:
            order: None for the reference's, if it has labels.
            reference: of the run's classes.

        Raises:
            UserError: the reference has no labels.
        """
        if order == "balanced" or (order is None and reference is None):
            return Labels(lambda numbers_B: numbers_B % self.classes, f"balanced over {self.classes}")
        if reference is None:
            raise UserError(
                "--labels reference needs a reference with labels, a split; use --labels balanced"
            )
        split = reference
        return Labels(
            lambda numbers_B: split.labels((numbers_B % split.count).tolist()), f"reference {split.sha256}"
        )

    def codes(self, numbers: range, labels: Labels) -> Columns:
        """`codes` int32 [B, L] of these samples, row by row of the grid, their `labels`, and seconds for each."""
        description = self.run.description
        labels_B = labels.of(np.array(numbers))
        result = sample(
            self.run.model,
            description.vocabulary,
            description.length_tokens,
            self.config,
            known_BL=known_prefixes(
                [[]] * len(numbers), description.length_tokens, description.vocabulary.bos_id
            ),
            labels_B=labels_B,
            seed=self._seed,
            batch_sequences=self._batch_images,
            first_sample_number=numbers.start,
            device=self._device,
        )
        seconds_B = np.full(len(numbers), result.elapsed_s / len(numbers))
        codes_BL = result.tokens_BL[:, 1:].astype(np.int32)
        return {"codes": codes_BL, "labels": labels_B.astype(np.int64), "sampling_s": seconds_B}
