"""PGM sampled as MDLM is: full-length inputs, the masked tokens being group 1 (FACTS 4, "PGM naive").

It costs as much as MDLM and gives the tokens that the non-uniform sampler gives: the slow reference of the
packed samplers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pgm_scale.models.partition_transformer import PartitionInputs, register_tokens, registers_in_group1
from pgm_scale.models.segments import Segments
from pgm_scale.sampling.ancestral import opening_steps
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import DecodingStep, decode


def sample_naive(model: nn.Module, batch: SamplingBatch) -> tuple[torch.Tensor, int]:
    """Decode with at most `sampler.steps` + 1 forward passes over all L positions of a row."""
    return decode(model, predict_by_groups, batch, opening_steps(batch))


def predict_by_groups(model: Any, batch: SamplingBatch, step: DecodingStep) -> torch.Tensor:
    """A `Predict` for `PartitionTransformer` in the training layout: group 0 is clean, group 1 is masked.

    Tokens are sorted by (row, group), registers included; the queries hold each row's groups swapped.
    """
    masked_BL, registers = step.masked_BL, model.config.registers
    rows, length = masked_BL.shape
    in_front_R = batch.on_device(register_tokens(registers))
    tokens_BC = torch.cat([in_front_R.expand(rows, -1), step.tokens_BL], dim=1)  # columns are true positions
    front_BR = np.broadcast_to(registers_in_group1(registers), (rows, registers))
    in_group1_BC = np.concatenate([front_BR, masked_BL], axis=1)
    key_order_BC = batch.on_device(np.argsort(in_group1_BC, axis=1, kind="stable"))
    query_order_BL = np.argsort(~masked_BL, axis=1, kind="stable")
    keys1_B, queries1_B = in_group1_BC.sum(axis=1), masked_BL.sum(axis=1)
    key_lengths_S = np.stack([registers + length - keys1_B, keys1_B], axis=1).reshape(-1)
    query_lengths_S = np.stack([queries1_B, length - queries1_B], axis=1).reshape(-1)
    inputs = PartitionInputs(
        tokens_T=tokens_BC.gather(1, key_order_BC).view(-1),
        positions_T=key_order_BC.view(-1),
        segments=Segments.of(key_lengths_S.tolist(), batch.device),
        query_positions_Q=batch.on_device(registers + query_order_BL.reshape(-1)),
        query_segments=Segments.of(query_lengths_S.tolist(), batch.device),
        classes_B=None if batch.labels_B is None else batch.on_device(batch.labels_B[step.rows_B]),
    )
    # The sort is stable, so a row's targets are met in increasing position, as `Predict` must return them.
    target_rows_Q = np.flatnonzero(np.take_along_axis(step.target_BL, query_order_BL, axis=1))
    return model(inputs, readout=batch.draw(step.uniforms_Q, target_rows_Q))
