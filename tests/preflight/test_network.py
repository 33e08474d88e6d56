"""Sums that are known exactly, and the ring of nodes."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgm_scale.preflight.network import contribution, ring_rounds, spread_for


@given(st.integers(0, 40), st.integers(1, 50), st.integers(3, 9))
def test_a_contribution_is_what_its_definition_says(rank: int, count: int, spread: int) -> None:
    expected = [(1 + rank % 3) if (i + rank) % spread == 0 else 0 for i in range(count)]
    assert contribution(rank, count, spread).tolist() == expected


@pytest.mark.parametrize("ranks", [2, 8, 64, 129, 1024])
def test_every_partial_sum_is_exact_in_bf16(ranks: int) -> None:
    spread = spread_for(range(ranks))
    whole = torch.zeros(spread, dtype=torch.int64)
    rounded = torch.zeros(spread, dtype=torch.bfloat16)
    for rank in torch.randperm(ranks, generator=torch.Generator().manual_seed(ranks)).tolist():
        whole += contribution(rank, spread, spread)
        rounded += contribution(rank, spread, spread).bfloat16()
        assert torch.equal(rounded.long(), whole)
    assert whole.max() > 0


def test_a_rank_that_is_lost_doubled_or_shifted_changes_the_sum() -> None:
    ranks = range(8)
    spread = spread_for(ranks)
    parts = torch.stack([contribution(rank, 30, spread) for rank in ranks])
    for rank in ranks:
        assert parts[rank].any()
        assert not torch.equal(parts[rank].roll(1), parts[rank])


@given(st.integers(0, 40))
def test_the_ring_meets_every_neighbour_once_and_no_node_twice_in_a_round(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    rounds = ring_rounds(nodes)
    for pairs in rounds:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends)) > 0
    met = [frozenset(pair) for together in rounds for pair in together]
    around = {frozenset((nodes[i], nodes[(i + 1) % count])) for i in range(count)} if count > 1 else set()
    assert Counter(met) == Counter(around)
    assert len(rounds) <= 3
