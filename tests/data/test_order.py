from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.data.order import BatchPlan, GlobalOrder, step_sample_numbers

ROWS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@pytest.mark.fault(23)
@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 2**64 - 1), st.integers(1, 14), st.integers(0, 5), st.booleans())
def test_every_epoch_is_a_permutation_of_all_rows(rows, seed, block, epoch, shuffle) -> None:
    order = GlobalOrder(rows, seed, block, shuffle)
    total = sum(rows)
    shards, places = order.locate(np.arange(epoch * total, (epoch + 1) * total))
    everything = [(shard, row) for shard, count in enumerate(rows) for row in range(count)]
    assert sorted(zip(shards.tolist(), places.tolist(), strict=True)) == everything


@pytest.mark.fault(23)
@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 14), st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_a_sample_does_not_depend_on_what_it_is_asked_with(rows, block, numbers) -> None:
    together = GlobalOrder(rows, 5, block).locate(np.array(numbers))
    alone = [GlobalOrder(rows, 5, block).locate(np.array([number])) for number in numbers]
    np.testing.assert_array_equal(together, np.concatenate(alone, axis=1))


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(1, 14))
def test_a_block_holds_its_shards_and_no_others(rows, block) -> None:
    order = GlobalOrder(rows, 1, block)
    shards, _ = order.locate(np.arange(sum(rows)))
    start = 0
    seen: set[int] = set()
    while start < len(shards):
        inside: set[int] = set()
        while start < len(shards) and (shards[start] in inside or len(inside) < block):
            inside.add(int(shards[start]))
            start += 1
        assert not inside & seen
        seen |= inside


def test_rows_are_mixed_over_the_block_and_differ_by_epoch_and_seed() -> None:
    order = GlobalOrder([100] * 4, 1, 2)
    first, _ = order.locate(np.arange(50))
    assert len(set(first.tolist())) == 2
    epochs = [order.locate(np.arange(400) + 400 * epoch)[1] for epoch in range(2)]
    assert (epochs[0] != epochs[1]).mean() > 0.9
    assert (GlobalOrder([100] * 4, 2, 2).locate(np.arange(400))[1] != epochs[0]).mean() > 0.9


def test_the_order_is_the_same_on_every_machine() -> None:
    """Stored numbers: a run that resumes elsewhere, or with another numpy, must not see another order."""
    shards, rows = GlobalOrder([3, 2, 4], 1, 2).locate(np.arange(18))
    assert shards.tolist() == [2, 2, 0, 2, 0, 2, 0, 1, 1, 1, 0, 0, 0, 1, 2, 2, 2, 2]
    assert rows.tolist() == [0, 3, 2, 1, 1, 2, 0, 0, 1, 1, 2, 1, 0, 0, 3, 2, 1, 0]


def test_unshuffled_is_the_stored_order_again_and_again() -> None:
    shards, rows = GlobalOrder([2, 1], 9, 8, shuffle=False).locate(np.arange(6))
    assert shards.tolist() == [0, 0, 1] * 2
    assert rows.tolist() == [0, 1, 0] * 2


@pytest.mark.fault(23)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**9))
def test_ranks_and_micro_batches_cover_a_step_exactly_once(micro, ranks, micro_steps, step) -> None:
    size = micro * ranks * micro_steps
    numbers = [
        step_sample_numbers(step, m, rank, ranks, size, micro)
        for rank in range(ranks)
        for m in range(micro_steps)
    ]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(step * size, (step + 1) * size))


def test_batch_plan_is_the_slice_rule() -> None:
    plan = BatchPlan(12, 2, data_rank=1, data_ranks=3)
    assert plan.micro_steps == 2
    assert plan.sample_numbers(4, 1).tolist() == [4 * 12 + (1 * 3 + 1) * 2 + i for i in range(2)]
    with pytest.raises(AssertionError):
        BatchPlan(12, 5)
