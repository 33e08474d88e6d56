"""The models that the rows time: the issue's small ones on a CPU, published sizes on a GPU; random weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from pgm_scale.config import DiffusionTransformerConfig, PartitionTransformerConfig
from pgm_scale.data.manifest import Vocabulary

LENGTH = 1024
VOCABULARY = Vocabulary(size=50_258, mask_id=50_257, bos_id=50_256, eos_id=50_256, pad_id=None)
PGM = PartitionTransformerConfig(hidden_size=256, num_heads=4, num_encoder_blocks=4, num_decoder_blocks=4)
MDLM = DiffusionTransformerConfig(hidden_size=256, num_heads=4, num_blocks=8)

Model = TypeVar("Model", bound=nn.Module)


def with_random_weights(model: Model) -> Model:
    """Weights that leave nothing at 0 (gates and the output linear start there), so that nothing is skipped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.05, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model
