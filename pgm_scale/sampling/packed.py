"""PGM's packed prediction: the forward pass sees the clean tokens only, and answers for the targets only.

This is what makes PGM cheap to sample (paper Algorithms 2-5): no masked token is ever processed. Rows are
segments of one packed tensor, so rows of different progress need neither padding nor masks. Only a
class-conditional model needs rows of equal progress in one pass, because each row has a condition of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgm_scale.models.partition_transformer import PartitionInputs, register_tokens, registers_in_group1
from pgm_scale.models.segments import Segments
from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.decode import DecodingStep, Predict


def predict_packed(model: Any, batch: SamplingBatch, step: DecodingStep) -> Tensor:
    """A `Predict` for `PartitionTransformer`: a row's clean tokens are its keys, its targets its queries."""
    if batch.labels_B is None:
        return _predict(model, batch, step)
    return in_equal_rows(_predict)(model, batch, step)


def _predict(model: Any, batch: SamplingBatch, step: DecodingStep) -> Tensor:
    classes_B = None if batch.labels_B is None else batch.on_device(batch.labels_B[step.rows_B])
    inputs = packed_inputs(step.tokens_BL, ~step.masked_BL, step.target_BL, model.config.registers, classes_B)
    return model(inputs, readout=batch.draw(step.uniforms_Q))


def packed_inputs(
    tokens_BL: Tensor,
    clean_BL: np.ndarray,
    target_BL: np.ndarray,
    registers: int = 0,
    classes_B: Tensor | None = None,
) -> PartitionInputs:
    """The inputs of one forward pass; its queries are the targets in row-major order.

    A row's keys are the registers of group 0, then its clean tokens, in the order of their positions.

    Args:
        tokens_BL: int64 on the compute device; only the clean ones are read.
        clean_BL: bool on the host, the tokens to read; what it leaves out of them is as if it were not there.
        target_BL: bool on the host, the positions to predict.
        registers: R of the model.
        classes_B: int64 on the compute device, for a class-conditional model, whose rows must then have equal
            numbers of clean tokens, and of targets (`in_equal_rows`).
    """
    rows, device = len(clean_BL), tokens_BL.device
    in_front_R = torch.from_numpy(register_tokens(registers)).to(device)
    tokens_BC = torch.cat([in_front_R.expand(rows, -1), tokens_BL], dim=1)  # columns are true positions
    read_R = np.broadcast_to(~registers_in_group1(registers), (rows, registers))
    read_BC = np.concatenate([read_R, clean_BL], axis=1)
    read_T = torch.from_numpy(np.flatnonzero(read_BC)).to(device)
    target_Q = torch.from_numpy(np.flatnonzero(target_BL)).to(device)
    return PartitionInputs(
        tokens_T=tokens_BC.view(-1)[read_T],
        positions_T=read_T % read_BC.shape[1],
        segments=Segments.of(read_BC.sum(axis=1).tolist(), device),
        query_positions_Q=registers + target_Q % target_BL.shape[1],
        query_segments=Segments.of(target_BL.sum(axis=1).tolist(), device),
        classes_B=classes_B,
    )


def without_latest(clean_BL: np.ndarray, rank_BL: np.ndarray, count: int) -> np.ndarray:
    """`clean_BL` without the `count` tokens of each row that were decoded last: the quirk "register_offset".

    The published samplers give attention the number of clean tokens as the length of the packed keys, though R/2
    registers stand in front of them; so the last R/2 clean tokens in the order of decoding (BOS at the first step)
    are no keys in any layer (FACTS 8.14). They still pass through the encoder, but nobody reads what becomes of
    them there; leaving them out is therefore exact.

    Args:
        rank_BL: int64, when each token was decoded; known ones before all others, and BOS first.
    """
    order_BL = np.argsort(np.where(clean_BL, -rank_BL, np.iinfo(np.int64).max), axis=1, kind="stable")
    kept_BL = clean_BL.copy()
    np.put_along_axis(kept_BL, order_BL[:, :count], False, axis=1)
    return kept_BL


def in_equal_rows(predict: Predict) -> Predict:
    """The same prediction by one call for the rows of each (number of clean tokens, number of targets)."""

    def predict_parts(model: Any, batch: SamplingBatch, step: DecodingStep) -> Tensor:
        counts_B2 = np.stack([step.masked_BL.sum(axis=1), step.target_BL.sum(axis=1)], axis=1)
        _, part_B = np.unique(counts_B2, axis=0, return_inverse=True)
        part_B = part_B.reshape(-1)
        if not part_B.any():
            return predict(model, batch, step)
        part_Q = np.repeat(part_B, counts_B2[:, 1])
        drawn = []
        for part in range(part_B.max() + 1):
            is_own_B, is_own_Q = part_B == part, part_Q == part
            own_step = replace(
                step,
                rows_B=step.rows_B[is_own_B],
                tokens_BL=step.tokens_BL[batch.on_device(np.flatnonzero(is_own_B))],
                masked_BL=step.masked_BL[is_own_B],
                target_BL=step.target_BL[is_own_B],
                uniforms_Q=step.uniforms_Q[is_own_Q],
            )
            drawn.append(predict(model, batch, own_step))
        place_Q = np.argsort(np.argsort(part_Q, kind="stable"))
        return torch.cat(drawn, dim=-1)[..., batch.on_device(place_Q)]

    return predict_parts
