"""Logits at every position of whole rows, one call for all models: to compare models, and for Hugging Face's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pgm_scale.models.partition_transformer import (
    PartitionInputs,
    PartitionTransformer,
    register_tokens,
    registers_in_group1,
)
from pgm_scale.models.segments import Segments


def row_logits(
    model: nn.Module,
    tokens_BL: Tensor,
    mask_id: int,
    groups_BL: Tensor | None = None,
    classes_B: Tensor | None = None,
    sigma_B: Tensor | None = None,
) -> Tensor:
    """fp32 logits `[B, L, V]`; of MaskGIT, which knows no BOS, `[B, L - 1, V - 1]`.

    A Partition Transformer predicts each position from the known tokens of the other group. It never reads a mask,
    so its groups are by default the known tokens (0) and the masked positions (1), as its samplers have them:
    masked positions are predicted from all known tokens, known ones from none.

    Args:
        tokens_BL: int64, on the model's device; the mask id where a token is not known.
        groups_BL: 0 or 1, only for a Partition Transformer.
        classes_B: int64, for a class-conditional model; its `num_classes` is no class.
        sigma_B: noise levels, for a time-conditioned model.
    """
    call: Any = model
    if not isinstance(model, PartitionTransformer):
        assert groups_BL is None, "only a Partition Transformer has groups"
        conditions = [x for x in (classes_B, sigma_B) if x is not None]
        return call(tokens_BL, *conditions)
    known_BL = tokens_BL != mask_id
    groups_BL = (~known_BL).long() if groups_BL is None else groups_BL.long()
    if classes_B is None:
        return _partition_logits(call, tokens_BL, known_BL, groups_BL, None)
    # Rows of a class-conditional model must have equally many tokens in one pass (`PartitionInputs`).
    rows = [
        _partition_logits(
            call, *(values[row : row + 1] for values in (tokens_BL, known_BL, groups_BL, classes_B))
        )
        for row in range(len(tokens_BL))
    ]
    return torch.cat(rows)


def _partition_logits(
    model: Any, tokens_BL: Tensor, known_BL: Tensor, groups_BL: Tensor, classes_B: Tensor | None
) -> Tensor:
    """The training layout, without the masks: keys sorted by (row, group), queries with the groups swapped."""
    (rows, length), registers, device = tokens_BL.shape, model.config.registers, tokens_BL.device

    def behind(front_R: Any, values_BL: Tensor) -> Tensor:
        front = torch.as_tensor(front_R, device=device, dtype=values_BL.dtype)
        return torch.cat([front.expand(rows, -1), values_BL], dim=1)

    tokens_BC = behind(register_tokens(registers), tokens_BL)  # columns are true positions
    groups_BC = behind(registers_in_group1(registers), groups_BL)
    is_key_B2C = (
        torch.stack([groups_BC == 0, groups_BC == 1], dim=1) & behind([True] * registers, known_BL)[:, None]
    )
    is_query_B2L = torch.stack([groups_BL == 1, groups_BL == 0], dim=1)
    keys_T3, queries_Q3 = is_key_B2C.nonzero(), is_query_B2L.nonzero()
    inputs = PartitionInputs(
        tokens_T=tokens_BC[keys_T3[:, 0], keys_T3[:, 2]],
        positions_T=keys_T3[:, 2],
        segments=Segments.of(is_key_B2C.sum(dim=2).flatten().tolist(), device),
        query_positions_Q=registers + queries_Q3[:, 2],
        query_segments=Segments.of(is_query_B2L.sum(dim=2).flatten().tolist(), device),
        classes_B=classes_B,
    )
    logits_QV = model(inputs)
    logits_BLV = logits_QV.new_empty(rows, length, logits_QV.shape[-1])
    logits_BLV[queries_Q3[:, 0], queries_Q3[:, 2]] = logits_QV
    return logits_BLV
