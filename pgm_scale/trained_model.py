"""A trained model and all that belongs to it, wherever it lies: in a run folder or in an exported one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from pgm_scale.config import ModelConfig, ObjectiveConfig, SamplerConfig
from pgm_scale.data.manifest import TOKENIZER_NAME, ImageContent, Vocabulary

Weights = Literal["ema", "weight"]


@dataclass(frozen=True)
class Origin:
    """Where weights come from; every number that is made with them carries it.

    Attributes:
        source: for people: a run's name, or the name of the foreign file and its format.
        run_id, step: None of foreign weights that say neither.
        weights: the average or the raw weights.
        checkpoint_sha256: of the checkpoint's manifest, which has its files' hashes, or of the foreign file.
    """

    source: str
    run_id: str | None
    step: int | None
    weights: Weights
    checkpoint_sha256: str

    @property
    def weights_name(self) -> str:
        """For people."""
        return {"ema": "averaged", "weight": "raw"}[self.weights]

    @property
    def summary(self) -> str:
        """For people: which weights of what."""
        return f"the {self.weights_name} weights of {self.source}" + (
            "" if self.step is None else f", step {self.step}"
        )


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model besides its weights: enough to build, sample and evaluate it.

    Attributes:
        objective: one of likelihood, if the model has one: a distilled model's is that of its pretraining.
        sampler: how it samples unless asked otherwise.
        tokenizer_sha256: of the tokenizer.json beside the weights; None of foreign weights without a tokenizer.
        images: what the rows are; None for text.
    """

    model: ModelConfig
    objective: ObjectiveConfig
    sampler: SamplerConfig
    vocabulary: Vocabulary
    length_tokens: int
    tokenizer_sha256: str | None
    images: ImageContent | None
    origin: Origin


@dataclass(frozen=True)
class TrainedModel:
    """A model in eval mode, without gradients, ready to sample from or to evaluate.

    Attributes:
        folder: a run folder or an exported one; its tokenizer.json, and of images vq.safetensors, are the model's.
    """

    model: nn.Module
    description: ModelDescription
    folder: Path

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER_NAME


def parameters_sha256(model: nn.Module) -> str:
    """A hash of names, shapes and fp32 values of all parameters: equal weights have equal hashes in any format."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().float().cpu().contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.view(-1).numpy().tobytes())
    return digest.hexdigest()
