"""Attention over a padded batch equals attention one segment at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pgm_scale.models.partition_transformer import segment_logsumexp, segment_mean
from pgm_scale.models.segments import Segments
from pgm_scale.sampling.engine.layouts import PackedLayout
from pgm_scale.sampling.engine.ragged import PaddedRows, RaggedLayout, rounded_up
from pgm_scale.sampling.engine.values import Values

HEADS, HEAD_SIZE = 2, 4
HIDDEN = HEADS * HEAD_SIZE
CASES = [([3, 1, 5], [1, 2, 1]), ([4, 4], [1, 1]), ([7], [9]), ([2, 6], [9, 1]), ([1], [1])]


@pytest.mark.parametrize(("tokens", "queries"), CASES)
@pytest.mark.parametrize("behind", [0, 3])
def test_it_equals_the_packed_layout(tokens: list[int], queries: list[int], behind: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    all_tokens, all_queries = sum(tokens) + behind, sum(queries) + behind
    q_TND, k_TND, v_TND = (random(all_tokens, HEADS, HEAD_SIZE) for _ in range(3))
    q_QND, x_TH = random(all_queries, HEADS, HEAD_SIZE), random(all_tokens, HIDDEN)
    values = Values(random(HIDDEN, HIDDEN), random(HIDDEN), HEADS)
    ragged = RaggedLayout(tokens, queries, all_tokens, all_queries, torch.device("cpu"))
    packed = PackedLayout(Segments.of(tokens), Segments.of(queries))
    real, asked = slice(0, sum(tokens)), slice(0, sum(queries))

    attended = ragged.attend(q_TND, k_TND, v_TND)
    assert attended.shape == q_TND.shape
    assert attended.isfinite().all()
    torch.testing.assert_close(attended[real], packed.attend(q_TND[real], k_TND[real], v_TND[real]))
    read = ragged.read(q_QND, k_TND, x_TH, values)
    assert read.shape == q_QND.shape
    assert read.isfinite().all()
    expected = packed.read(q_QND[asked], k_TND[real], x_TH[real], values)
    torch.testing.assert_close(read[asked], expected, atol=1e-5, rtol=1e-5)
    for aggregate in (segment_mean, segment_logsumexp):
        aggregates = ragged.aggregates(aggregate, x_TH, all_queries)
        expected = packed.aggregates(aggregate, x_TH[real], sum(queries))
        torch.testing.assert_close(aggregates[asked], expected)


@pytest.mark.parametrize("lengths", [[2, 5, 1], [3, 3]])
@pytest.mark.parametrize("behind", [0, 2])
def test_padding_and_packing_undo_each_other(lengths: list[int], behind: int) -> None:
    rows = PaddedRows(lengths, sum(lengths) + behind, torch.device("cpu"))
    x_T = torch.arange(sum(lengths) + behind) + 1
    padded_SM = rows.pad(x_T)
    for number, part in enumerate(x_T[: sum(lengths)].split(lengths)):
        assert torch.equal(padded_SM[number, : len(part)], part)
    assert torch.equal(rows.pack(padded_SM)[: sum(lengths)], x_T[: sum(lengths)])
    assert len(rows.pack(padded_SM)) == len(x_T)


def test_numbers_of_rows_are_rounded_to_few_different_ones_at_little_cost() -> None:
    rounded = np.array([rounded_up(rows) for rows in range(1, 100_000)])
    rows = np.arange(1, 100_000)
    assert (rounded >= rows).all()
    assert (rounded[:16] == rows[:16]).all()
    assert ((rounded - rows)[256:] / rows[256:]).max() <= 1 / 16
    assert len(np.unique(rounded[:8192])) < 200
