import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import pack, pack_padded, pack_wrapped
from data_prep.pipeline import shard_ranges
from data_prep.sources import UnitSize, units_of
from pgm_scale.data.manifest import Vocabulary

GPT2_LIKE = Vocabulary(size=301, mask_id=300, bos_id=7, eos_id=8, pad_id=9)
documents_of_ids = st.lists(st.lists(st.integers(10, 299), max_size=20), max_size=12)


@given(documents_of_ids, st.integers(4, 12))
def test_wrapping_equals_the_published_description(documents, length):
    stream = []
    for document in documents:
        stream += [*document, 8]
    expected = []
    while len(stream) >= length - 2:
        expected.append([7, *stream[: length - 2], 8])
        stream = stream[length - 2 :]
    tokens, valid = pack_wrapped(documents, length, GPT2_LIKE)
    assert tokens.tolist() == expected
    assert tokens.shape == (len(expected), length)
    assert valid.tolist() == [length] * len(expected)
    assert tokens.dtype == np.uint16


@given(documents_of_ids, st.integers(4, 12))
def test_padding_equals_the_published_description(documents, length):
    tokens, valid = pack_padded(documents, length, GPT2_LIKE)
    for row, count, document in zip(tokens.tolist(), valid.tolist(), documents, strict=True):
        text = [7, *document[: length - 2], 8]
        assert count == len(text)
        assert row == text + [9] * (length - len(text))


def test_large_vocabularies_are_stored_wider():
    vocabulary = Vocabulary(size=100_001, mask_id=100_000, bos_id=0, eos_id=0, pad_id=None)
    tokens, _ = pack("wrap", [[99_999] * 10], 4, vocabulary)
    assert tokens.dtype == np.uint32
    assert tokens[0].tolist() == [0, 99_999, 99_999, 0]


def test_units_close_at_documents_or_characters():
    documents = [("train", "ab"), ("validation", "c"), ("train", "d"), ("train", "efgh"), ("train", "i")]
    units = [(u.split, u.number, u.documents) for u in units_of(documents, UnitSize(2, 4))]
    assert units == [
        ("train", 0, ["ab", "d"]),
        ("train", 1, ["efgh"]),
        ("train", 2, ["i"]),
        ("validation", 0, ["c"]),
    ]


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 10))
def test_shards_take_the_rows_in_order(rows_of_units, rows_per_shard):
    shards = shard_ranges(rows_of_units, rows_per_shard)
    rows = [[(unit, row) for unit, first, last in shard for row in range(first, last)] for shard in shards]
    assert [row for shard in rows for row in shard] == [
        (unit, row) for unit, count in enumerate(rows_of_units) for row in range(count)
    ]
    assert all(len(shard) == rows_per_shard for shard in rows[:-1])
    assert all(rows)
