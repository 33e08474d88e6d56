"""PGM sampled as MDLM is: full-length inputs, the masked tokens being group 1 (FACTS 4, "PGM naive").

It costs as much as MDLM and gives the tokens that the non-uniform sampler gives: the slow reference of the
packed samplers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.segments import Segments
from pgm_scale.sampling.ancestral import opening_steps
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import DecodingStep, decode


def sample_naive(model: nn.Module, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """Decode with at most `sampler.steps` + 1 forward passes over all L positions of a row."""
    return decode(model, predict_by_groups, batch, opening_steps(batch))


def predict_by_groups(model: nn.Module, batch: SamplingBatch, step: DecodingStep) -> torch.Tensor:
    """A `Predict` for `PartitionTransformer` in the training layout: group 0 is clean, group 1 is masked.

    Tokens are sorted by (row, group); the queries hold each row's groups swapped.
    """
    masked_BL = step.masked_BL
    length = masked_BL.shape[1]
    key_order_BL = np.argsort(masked_BL, axis=1, kind="stable")
    query_order_BL = np.argsort(~masked_BL, axis=1, kind="stable")
    masked_B = masked_BL.sum(axis=1)
    key_lengths_S = np.stack([length - masked_B, masked_B], axis=1).reshape(-1)
    query_lengths_S = np.stack([masked_B, length - masked_B], axis=1).reshape(-1)
    positions_T = batch.on_device(key_order_BL.reshape(-1))
    inputs = PartitionInputs(
        tokens_T=step.tokens_BL.gather(1, positions_T.view(masked_BL.shape)).view(-1),
        positions_T=positions_T,
        segments=Segments.of(tuple(key_lengths_S.tolist()), batch.device),
        query_positions_Q=batch.on_device(query_order_BL.reshape(-1)),
        query_segments=Segments.of(tuple(query_lengths_S.tolist()), batch.device),
    )
    # The sort is stable, so a row's targets are met in increasing position, as `Predict` must return them.
    target_rows_Q = np.flatnonzero(np.take_along_axis(step.target_BL, query_order_BL, axis=1))
    return model(inputs, readout=batch.draw(step.uniforms_Q, target_rows_Q))
