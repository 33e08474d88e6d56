"""Tiny class-conditional models with random weights, and their logits the slow way: one image at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pgm_scale.config import MaskGITTransformerConfig, PartitionTransformerConfig, SamplerConfig
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models import build_model
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.segments import Segments
from pgm_scale.sampling import SampleResult, SamplingBatch, sample

SIDE, CODEBOOK, CLASSES, REGISTERS = 4, 7, 3, 2
CODES, MASK, BOS = SIDE * SIDE, CODEBOOK, CODEBOOK + 1
LENGTH = 1 + CODES
VOCABULARY = Vocabulary(size=CODEBOOK + 2, mask_id=MASK, bos_id=BOS, eos_id=BOS, pad_id=None)
MODELS = ("pgm", "maskgit")


def image_model(name: str, dropout: float = 0.0) -> Any:
    config: Any
    sizes: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "dropout": dropout, "num_classes": CLASSES}
    if name == "pgm":
        blocks: dict[str, Any] = {"num_encoder_blocks": 2, "num_decoder_blocks": 2, "condition_size": 16}
        config = PartitionTransformerConfig(**sizes, **blocks, registers=REGISTERS)
    else:
        config = MaskGITTransformerConfig(**sizes, num_blocks=2, registers=1)
    torch.manual_seed(5)
    model = build_model(config, VOCABULARY.size, LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def known_images(unknown_B: list[int]) -> np.ndarray:
    """Rows of BOS and codes, of which so many are unknown, anywhere."""
    generator = np.random.default_rng(4)
    known_BL = generator.integers(0, CODEBOOK, (len(unknown_B), LENGTH))
    known_BL[:, 0] = BOS
    for known_L, unknown in zip(known_BL, unknown_B, strict=True):
        known_L[1 + generator.permutation(CODES)[:unknown]] = -1
    return known_BL


def generate(
    model: Any, known_BL: np.ndarray, labels: list[int], config: SamplerConfig, **changes: Any
) -> SampleResult:
    arguments: dict[str, Any] = {"seed": 1, "batch_sequences": 64, "device": "cpu"} | changes
    labels_B = np.array(labels)
    return sample(model, VOCABULARY, LENGTH, config, known_BL=known_BL, labels_B=labels_B, **arguments)


def batch_of(known_BL: np.ndarray, labels: list[int], config: SamplerConfig) -> SamplingBatch:
    """As `generate` makes it."""
    numbers = np.arange(len(known_BL))
    return SamplingBatch(known_BL, numbers, 1, VOCABULARY, config, torch.device("cpu"), np.array(labels))


def code_logits(model: Any, tokens_L: np.ndarray, masked_L: np.ndarray, label: int) -> np.ndarray:
    """float64 [L, codebook]: the logits of every position; PGM's by the training layout, group 1 what is masked."""
    scores_LV = np.zeros((LENGTH, CODEBOOK))
    classes = torch.tensor([label])
    with torch.inference_mode():
        if not isinstance(model.config, PartitionTransformerConfig):
            scores_LV[1:] = model(torch.from_numpy(tokens_L)[None], classes)[0, :, :CODEBOOK]
            return scores_LV
        clean, masked = np.flatnonzero(~masked_L), np.flatnonzero(masked_L)
        queries = np.concatenate([masked, clean])
        inputs = PartitionInputs(  # register 1 is in group 0, register 0 in group 1
            tokens_T=torch.tensor([-2, *tokens_L[clean], -1, *tokens_L[masked]]),
            positions_T=torch.tensor([1, *(REGISTERS + clean), 0, *(REGISTERS + masked)]),
            segments=Segments.of([1 + len(clean), 1 + len(masked)], "cpu"),
            query_positions_Q=torch.from_numpy(REGISTERS + queries),
            query_segments=Segments.of([len(masked), len(clean)], "cpu"),
            classes_B=classes,
        )
        scores_LV[queries] = model(inputs)[:, :CODEBOOK]
    return scores_LV


def guided_probabilities(
    model: Any, tokens_L: np.ndarray, masked_L: np.ndarray, label: int, weight: float, temperature: float
) -> np.ndarray:
    """float64 [L, codebook], the combination of two sets of logits written out."""
    with_class = code_logits(model, tokens_L, masked_L, label)
    without = code_logits(model, tokens_L, masked_L, CLASSES)
    scores = with_class if label == CLASSES else (1 + weight) * with_class - weight * without
    shares = np.exp((scores - scores.max(axis=1, keepdims=True)) / temperature)
    return shares / shares.sum(axis=1, keepdims=True)


def token_at(probabilities_V: np.ndarray, uniform: float) -> int:
    return int(np.searchsorted(np.cumsum(probabilities_V), uniform, side="right"))


def ramp(config: SamplerConfig, step: int, steps: int) -> float:
    if config.guidance_schedule == "constant" or steps == 1:
        return config.guidance
    return config.guidance * step / (steps - 1)


def shown(codes: int, progress: float) -> int:
    """int(N (1 - (2/pi) arccos(progress))); a third of N at 1/2 is as whole as it should be."""
    return int(codes * (1 - 2 / math.pi * math.acos(progress)) + 1e-9)


def assert_any_batch_split_gives_the_same(model: Any, config: SamplerConfig) -> None:
    """Rows that know different amounts, with and without a class, at any batch size and from any number on."""
    known_BL, labels = known_images([CODES, 9, CODES, 9, 3]), [0, 1, 2, CLASSES, 1]
    whole = generate(model, known_BL, labels, config)
    for batch_sequences in (1, 2):
        split = generate(model, known_BL, labels, config, batch_sequences=batch_sequences)
        np.testing.assert_array_equal(split.tokens_BL, whole.tokens_BL)
    tail = generate(model, known_BL[2:], labels[2:], config, first_sample_number=2)
    np.testing.assert_array_equal(tail.tokens_BL, whole.tokens_BL[2:])
    assert (generate(model, known_BL, labels, config, seed=2).tokens_BL != whole.tokens_BL).any()
    np.testing.assert_array_equal(whole.tokens_BL[known_BL >= 0], known_BL[known_BL >= 0])
    assert whole.tokens_BL[:, 1:].max() < CODEBOOK
