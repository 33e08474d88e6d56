"""The shards of all tensor-parallel ranks make up the whole tensor, and hold the values that the layers expect."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgm_scale.tensor_slices import TensorSlice

RANKS = st.integers(1, 4)
SIDE = st.integers(1, 4)


def assert_tiled(slices, expected_of_rank):
    """Each shard equals the oracle's, and every element is in exactly one of them."""
    shape = slices[0].global_shape
    numbers = torch.arange(int(np.prod(shape))).reshape(shape)
    taken = [slice_.take(numbers) for slice_ in slices]
    for slice_, shard, expected in zip(slices, taken, expected_of_rank, strict=True):
        assert shard.tolist() == expected.flatten().tolist()
        assert slice_.numel == len(shard)
    assert sorted(torch.cat(taken).tolist()) == list(range(numbers.numel()))


@given(ranks=RANKS, parts=st.integers(1, 3), rows=SIDE, columns=st.integers(0, 4))
def test_column_parallel_weight_of_fused_parts(ranks, parts, rows, columns):
    """Each rank has its share of the output rows of each part, as Megatron lays fused projections out."""
    shape = (parts * ranks * rows, columns)
    whole = np.arange(np.prod(shape)).reshape(shape)
    stride = ranks * rows * columns
    slices = [TensorSlice(shape, r * rows * columns, rows * columns, stride) for r in range(ranks)]
    shares = [
        np.concatenate([np.split(part, ranks)[r] for part in np.split(whole, parts)]) for r in range(ranks)
    ]
    assert_tiled(slices, shares)


@given(ranks=RANKS, parts=st.integers(1, 3), rows=SIDE)
def test_column_parallel_bias_of_fused_parts(ranks, parts, rows):
    whole = np.arange(parts * ranks * rows)
    slices = [TensorSlice(whole.shape, r * rows, rows, ranks * rows) for r in range(ranks)]
    assert_tiled(slices, [whole.reshape(parts, ranks, rows)[:, r] for r in range(ranks)])


@given(ranks=RANKS, rows=st.integers(0, 4), columns=SIDE)
def test_row_parallel_weight(ranks, rows, columns):
    shape = (rows, ranks * columns)
    whole = np.arange(np.prod(shape)).reshape(shape)
    slices = [TensorSlice(shape, r * columns, columns, ranks * columns) for r in range(ranks)]
    assert_tiled(slices, np.split(whole, ranks, axis=1))


@given(ranks=RANKS, vocabulary=st.integers(1, 20), hidden=SIDE, multiple=SIDE)
def test_vocabulary_with_padding_rows(ranks, vocabulary, hidden, multiple):
    """The padded vocabulary is cut evenly; the last ranks may hold only padding, which is not in the tensor."""
    share = -(-vocabulary // (ranks * multiple)) * multiple
    bounds = [(min(r * share, vocabulary), min((r + 1) * share, vocabulary)) for r in range(ranks)]
    whole = np.arange(vocabulary * hidden).reshape(vocabulary, hidden)
    slices = [
        TensorSlice(whole.shape, low * hidden, (high - low) * hidden, whole.size) for low, high in bounds
    ]
    assert_tiled(slices, [whole[low:high] for low, high in bounds])


@given(shape=st.lists(st.integers(0, 4), max_size=3))
def test_whole(shape):
    slice_ = TensorSlice.whole(shape)
    values = torch.randn(shape)
    assert slice_.is_whole
    assert slice_.global_shape == tuple(shape)
    assert torch.equal(slice_.take(values), values.flatten())


def test_a_shard_is_not_whole():
    assert not TensorSlice((2, 4), 0, 2, 4).is_whole
    assert not TensorSlice((2, 4), 0, 0, 8).is_whole


@pytest.mark.parametrize(
    ("offset", "run", "stride"), [(-1, 2, 4), (0, -1, 4), (3, 2, 4), (0, 3, 3), (0, 0, 0), (0, 16, 16)]
)
def test_a_slice_must_lie_in_its_tensor(offset, run, stride):
    with pytest.raises(AssertionError):
        TensorSlice((2, 4), offset, run, stride)


def test_the_tensor_must_have_the_shape():
    with pytest.raises(AssertionError):
        TensorSlice.whole((2, 4)).take(torch.zeros(4, 2))
