"""Image sampling: PGM against MaskGIT of as many blocks of the same width, by Halton order, without guidance."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import nn

from ops.bench.machine import Machine
from ops.bench.measure import Row, Side, Target, ratio, take_turns
from ops.bench.models import with_random_weights
from pgm_scale.config import MaskGITTransformerConfig, ModelConfig, PartitionTransformerConfig, SamplerConfig
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models import build_model
from pgm_scale.sampling import SampleResult, known_prefixes, sample

LENGTH = 1025  # BOS and 32 x 32 codes
VOCABULARY = Vocabulary(size=16_386, mask_id=16_384, bos_id=16_385, eos_id=16_385, pad_id=None)
STEPS, WARM_UP_STEPS = 32, 4
REPEATS = 3
# Images a batch, width, heads, and blocks of MaskGIT, which PGM divides into encoder and decoder.
CPU_SIZE, CUDA_SIZE = (2, 256, 4, 8), (32, 1024, 16, 24)


def rows(machine: Machine) -> Iterator[Row]:
    on_cuda = machine.device.type == "cuda"
    images, hidden, heads, blocks = CUDA_SIZE if on_cuda else CPU_SIZE
    configs: dict[str, ModelConfig] = {
        "PGM": PartitionTransformerConfig(
            hidden_size=hidden,
            num_heads=heads,
            num_encoder_blocks=blocks // 2,
            num_decoder_blocks=blocks // 2,
            condition_size=hidden,
            num_classes=1000,
            registers=2,
        ),
        "MaskGIT": MaskGITTransformerConfig(hidden_size=hidden, num_heads=heads, num_blocks=blocks),
    }
    dtype = torch.bfloat16 if on_cuda else torch.float32
    models = {
        name: with_random_weights(build_model(config, VOCABULARY.size, LENGTH))
        .eval()
        .to(machine.device, dtype)
        for name, config in configs.items()
    }
    sides = [
        Side(name, partial(generate, model, images, STEPS, machine.device)) for name, model in models.items()
    ]
    for model in models.values():
        generate(model, images, WARM_UP_STEPS, machine.device)
    seconds = take_turns(sides, REPEATS, warm_ups=0)
    per_second = {name: images / statistics.median(repeats) for name, repeats in seconds.items()}
    yield Row(
        f"image sampling, PGM {blocks // 2}/{blocks // 2}, against MaskGIT of {blocks} blocks; 32 x 32 codes, "
        f"H {hidden}, batch {images}, {STEPS} Halton steps, no guidance",
        ratio(seconds, "MaskGIT", "PGM"),
        "x",
        Target(4.0, 5.0),
        seconds,
        note=", ".join(f"{name} {value:.3g} images/s" for name, value in per_second.items()),
    )


def generate(model: nn.Module, images: int, steps: int, device: torch.device) -> SampleResult:
    return sample(
        model,
        VOCABULARY,
        LENGTH,
        SamplerConfig(kind="halton", steps=steps),
        known_BL=known_prefixes([[]] * images, LENGTH, VOCABULARY.bos_id),
        labels_B=np.arange(images),
        seed=1,
        batch_sequences=images,
        device=device,
    )
