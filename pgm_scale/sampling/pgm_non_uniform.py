"""PGM's non-uniform sampler (paper Algorithms 3-5): MDLM's law of how many tokens open at each step.

The published code draws every step's count from Binomial(L, dt), whatever is left to decode, so it runs out
of steps or of tokens (FACTS 8.8). Here each unknown position draws its own step from the ancestral process, so
the count of a step is Binomial(what remains, (alpha_s - alpha_t) / (1 - alpha_t)) and the law is MDLM's exactly.
What is left at the end of the grid is decoded in one more forward pass.
"""

from __future__ import annotations

import torch
from torch import nn

from pgm_scale.sampling.ancestral import opening_steps
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import decode
from pgm_scale.sampling.packed import predict_packed


def sample_non_uniform(model: nn.Module, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """At most `sampler.steps` + 1 forward passes: a step in which no row opens anything is skipped."""
    return decode(model, predict_packed, batch, opening_steps(batch))
