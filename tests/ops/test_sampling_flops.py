"""The FLOPs by which the sampling rows judge themselves, against torch's own counter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ops.bench.sampling_rows import pgm_flops
from pgm_scale.sampling.engine import fold, linear, uniform
from pgm_scale.sampling.engine.uniform import UniformSampler
from pgm_scale.sampling.engine.values import few_queries
from tests.sampling.engine.support import LENGTH, SIZE, batch_of, known_tokens, partition


@pytest.mark.parametrize("steps", [1, 6, 39])
def test_sampling_flops_are_those_that_torch_counts(steps, monkeypatch):
    monkeypatch.setattr(linear, "ReorderedLinear", linear.PlainLinear)  # the counter does not know oneDNN's
    monkeypatch.setattr(uniform, "PADDED_TOKENS", 1)  # padding is not work
    model = partition()
    with torch.inference_mode():
        sampler = UniformSampler(fold(model))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sampler(batch_of(known_tokens([1, 1]), steps=steps))
    hidden, heads, reads = 32, model.config.num_heads, model.config.num_decoder_blocks + 1
    bounds = [1 + -(-k * (LENGTH - 1) // steps) for k in range(steps + 1)]
    zeros = sum(
        reads * 2 * hidden * (heads - 1) * clean * (end - clean)
        for clean, end in pairwise(bounds)
        if few_queries(end - clean, heads, hidden)
    )
    assert counter.get_total_flops() == 2 * (pgm_flops(model.config, steps, LENGTH, SIZE) + zeros)
