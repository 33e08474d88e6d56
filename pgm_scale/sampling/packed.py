"""PGM's packed prediction: the forward pass sees the clean tokens only, and answers for the targets only.

This is what makes PGM cheap to sample (paper Algorithms 2-5): no masked token is ever processed. Rows are
segments of one packed tensor, so rows of different progress need neither padding nor masks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.segments import Segments
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import DecodingStep


def predict_packed(model: nn.Module, batch: SamplingBatch, step: DecodingStep) -> torch.Tensor:
    """A `Predict` for `PartitionTransformer`: a row's clean tokens are its keys, its targets its queries."""
    clean_BL = ~step.masked_BL
    clean_T = batch.on_device(np.flatnonzero(clean_BL))
    target_Q = batch.on_device(np.flatnonzero(step.target_BL))
    length = clean_BL.shape[1]
    inputs = PartitionInputs(
        tokens_T=step.tokens_BL.view(-1)[clean_T],
        positions_T=clean_T % length,
        segments=Segments.of(tuple(clean_BL.sum(axis=1).tolist()), batch.device),
        query_positions_Q=target_Q % length,
        query_segments=Segments.of(tuple(step.target_BL.sum(axis=1).tolist()), batch.device),
    )
    return model(inputs, readout=batch.draw(step.uniforms_Q))
