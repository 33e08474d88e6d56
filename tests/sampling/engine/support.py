"""Tiny models with random weights everywhere, and batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pgm_scale.config import (
    DiffusionTransformerConfig,
    ModelConfig,
    PartitionTransformerConfig,
    SamplerConfig,
)
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models import build_model
from pgm_scale.sampling import SAMPLERS, SamplingBatch

LENGTH, SIZE, MASK, BOS = 40, 23, 22, 0
VOCABULARY = Vocabulary(size=SIZE, mask_id=MASK, bos_id=BOS, eos_id=BOS, pad_id=None)
CPU = torch.device("cpu")


def model_of(config: ModelConfig) -> Any:
    torch.manual_seed(5)
    model = build_model(config, SIZE, LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def partition(**changes: Any) -> Any:
    sizes = {"num_encoder_blocks": 3, "num_decoder_blocks": 2, "hidden_size": 32, "num_heads": 4}
    return model_of(PartitionTransformerConfig(condition_size=8, **(sizes | changes)))


def diffusion(**changes: Any) -> Any:
    sizes = {"num_blocks": 3, "hidden_size": 32, "num_heads": 4}
    return model_of(DiffusionTransformerConfig(condition_size=8, **(sizes | changes)))


def known_tokens(known_B: list[int]) -> np.ndarray:
    """Rows that know BOS and so many tokens in all, the others of them anywhere."""
    generator = np.random.default_rng(3)
    known_BL = np.full((len(known_B), LENGTH), -1)
    known_BL[:, 0] = BOS
    for known_L, known in zip(known_BL, known_B, strict=True):
        where = 1 + generator.permutation(LENGTH - 1)[: known - 1]
        known_L[where] = generator.integers(0, MASK, len(where))
    return known_BL


def batch_of(known_BL: np.ndarray, steps: int = 7, kind: Any = "pgm_uniform", **rules: Any) -> SamplingBatch:
    config = SamplerConfig(kind=kind, steps=steps, **rules)
    return SamplingBatch(known_BL, np.arange(len(known_BL)), 1, VOCABULARY, config, CPU)


def plain_tokens(model: Any, batch: SamplingBatch) -> np.ndarray:
    with torch.inference_mode():
        return SAMPLERS[batch.config.kind][1](model, batch)[0].numpy()
