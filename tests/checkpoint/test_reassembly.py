"""Any partition of any tensors is read by any other partition, and nothing partial is read silently."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pgm_scale.checkpoint import CheckpointStore, Fragment, Kind
from pgm_scale.checkpoint import reader as reader_module
from pgm_scale.errors import UserError
from pgm_scale.tensor_slices import TensorSlice

# Shape and stride: column-parallel weights of one and of three fused parts, a bias of two, row-parallel,
# vocabulary (whose last ranks get less or nothing), and what is never sharded.
SHARDED = st.sampled_from(
    [
        ((12, 3), 36),
        ((36, 2), 24),
        ((24,), 12),
        ((5, 12), 12),
        ((7, 3), 21),
        ((2, 1), 2),
        ((), 1),
        ((0, 3), 0),
    ]
)


def commit(folder, owned_of_ranks):
    folders = CheckpointStore(folder).folders
    folders.begin(1)
    entries = [folders.write_rank(1, rank, owned) for rank, owned in enumerate(owned_of_ranks)]
    folders.commit(1, entries, {})
    return CheckpointStore(folder)


def cut(low, high, edges):
    """The ranges (start, length) between edges that fall anywhere in [low, high)."""
    marks = [low, *sorted(low + edge % (high - low + 1) for edge in edges), high]
    return [(first, last - first) for first, last in itertools.pairwise(marks)]


EDGES = st.lists(st.integers(0, 1000), max_size=4)


@st.composite
def layouts(draw, shape, stride):
    """Ranges (slice, start, length) that cover a tensor once: tensor-parallel shards, each cut anywhere.

    The shards are even ones of 1 to 4 ranks, or of any widths; the first rows may be stored unsharded.
    """
    ranks = draw(st.integers(1, 4))
    share = -(-stride // ranks)
    even = [min(rank * share, stride) for rank in range(1, ranks)]
    columns = cut(0, stride, draw(st.one_of(st.just(even), EDGES)))
    numel = torch.Size(shape).numel()
    unsharded_rows = draw(st.sampled_from([0, 0, 1])) if stride < numel else 0
    ranges = [(TensorSlice.whole(shape), *r) for r in cut(0, unsharded_rows * stride, draw(EDGES))]
    for offset, run in columns:
        shard = TensorSlice(shape, offset, run, stride)
        ranges += [(shard, *r) for r in cut(unsharded_rows * run, shard.numel, draw(EDGES))]
    return ranges


def oracle(whole, slice_, start, length):
    """Element by element, through the numbers of the elements."""
    numbers = slice_.take(torch.arange(whole.numel()).view(whole.shape))[start : start + length]
    return [whole.flatten()[number] for number in numbers.tolist()]


def unique(ranges):
    """Without the empty ranges that would have the same key in a file as another range."""
    return list({(not r[0].is_whole and r[0], r[1]): r for r in ranges}.values())


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sharded=st.lists(SHARDED, min_size=1, max_size=4), ranks=st.integers(1, 4))
def test_any_layout_to_any_layout(data, sharded, ranks):
    tensors = {("weight", f"p{i}"): torch.randn(shape) for i, (shape, _) in enumerate(sharded)}
    owned_of_ranks: list[list[tuple[Kind, Fragment]]] = [[] for _ in range(ranks)]
    wanted = {}
    for (key, tensor), (shape, stride) in zip(tensors.items(), sharded, strict=True):
        for slice_, start, length in unique(data.draw(layouts(shape, stride))):
            values = torch.tensor(oracle(tensor, slice_, start, length))
            rank = data.draw(st.integers(0, ranks - 1))
            owned_of_ranks[rank].append((key[0], Fragment(key[1], slice_, start, values)))
        wanted[key] = (shape, data.draw(layouts(shape, stride)))
    with tempfile.TemporaryDirectory() as folder:
        store = commit(folder, owned_of_ranks)
        values = store.read(1, wanted)
        whole = store.read_full(1, "weight")
    for key, tensor in tensors.items():
        for range_, part in zip(wanted[key][1], values[key], strict=True):
            assert part.tolist() == oracle(tensor, *range_)
        assert torch.equal(whole[key[1]], tensor)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sharded=SHARDED, twice=st.booleans())
def test_a_piece_that_is_missing_or_there_twice_is_refused(data, sharded, twice):
    ranges = [r for r in unique(data.draw(layouts(*sharded))) if r[2] > 0]
    assume(ranges)
    pieces = [("weight", Fragment("block.w", slice_, start, torch.ones(n))) for slice_, start, n in ranges]
    faulty = data.draw(st.sampled_from(pieces))
    empty = ("weight", Fragment("block.w", TensorSlice.whole(sharded[0]), 0, torch.ones(0)))
    other = [faulty] if twice else []
    kept = [empty] if not twice and len(pieces) == 1 else [p for p in pieces if twice or p is not faulty]
    with tempfile.TemporaryDirectory() as folder:
        store = commit(folder, [kept, other])
        reason = "stored twice: .*rank_00000.*rank_00001" if twice else "nothing stored for elements"
        with pytest.raises(UserError, match=f"weight block.w: {reason}"):
            store.kinds(1)


def piece(name, shape, start, length):
    return ("weight", Fragment(name, TensorSlice.whole(shape), start, torch.arange(float(length))))


@pytest.mark.fault(25)
def test_holes_overlaps_and_contradictions_are_all_listed(tmp_path):
    store = commit(
        tmp_path,
        [
            [piece("hole", (10,), 0, 4), piece("overlap", (10,), 0, 6), piece("short", (10,), 0, 9)],
            [piece("hole", (10,), 5, 5), piece("overlap", (10,), 5, 5), piece("twin", (4,), 0, 4)],
            [piece("twin", (2, 2), 0, 0), piece("late", (3,), 1, 2)],
        ],
    )
    with pytest.raises(UserError) as caught:
        store.read_full(1, "weight")
    message = str(caught.value)
    assert "hole: nothing stored for elements 4 to 5" in message
    assert (
        "overlap: stored twice: elements 5 to 6 (in rank_00000.safetensors, rank_00001.safetensors)"
        in message
    )
    assert "short: nothing stored for elements 9 to 10" in message
    assert "twin: shape (2, 2)" in message
    assert "late: nothing stored for elements 0 to 1" in message


def shard(name, slice_, start=0, length=None):
    values = slice_.take(
        torch.arange(float(torch.Size(slice_.global_shape).numel())).view(slice_.global_shape)
    )
    return ("weight", Fragment(name, slice_, start, values[start:][:length]))


def row_shard(rank, ranks, shape=(3, 12)):
    run = shape[1] // ranks
    return TensorSlice(shape, rank * run, run, shape[1])


def test_holes_and_overlaps_between_tensor_parallel_shards_are_named(tmp_path):
    store = commit(
        tmp_path,
        [
            [shard("lost", row_shard(0, 4)), shard("twice", row_shard(0, 2)), shard("good", row_shard(0, 2))],
            [shard("lost", row_shard(2, 4)), shard("twice", row_shard(1, 2)), shard("good", row_shard(2, 4))],
            [shard("lost", row_shard(3, 4)), shard("twice", row_shard(3, 4)), shard("good", row_shard(3, 4))],
            [
                shard("cut", row_shard(0, 2), 0, 7),
                shard("cut", row_shard(0, 2), 8),
                shard("cut", row_shard(1, 2)),
            ],
        ],
    )
    with pytest.raises(UserError) as caught:
        store.kinds(1)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "weight lost: nothing stored for elements 3 to 6",
        "weight twice: stored twice: elements 9 to 12 (in rank_00001.safetensors, rank_00002.safetensors)",
        "weight cut: nothing stored for elements 13 to 14",
    ]


def test_shards_cut_in_two_ways_are_refused_in_one_line(tmp_path):
    by_rows, by_parts = row_shard(0, 2, (4, 6)), TensorSlice((4, 6), 0, 6, 12)
    store = commit(tmp_path / "stored", [[shard("w", by_rows), shard("w", by_parts)]])
    with pytest.raises(UserError, match=r"^weight w: its shards are cut in rows of \[6, 12\] elements.*$"):
        store.kinds(1)
    store = commit(tmp_path / "wanted", [[shard("w", by_rows), shard("w", row_shard(1, 2, (4, 6)))]])
    with pytest.raises(UserError, match=r"^weight w: its shards are cut in rows of \[6, 12\] elements.*$"):
        store.read(1, {("weight", "w"): ((4, 6), [(by_parts, 0, 1)])})


def test_version_1_is_read_by_shards(tmp_path, monkeypatch):
    """A checkpoint from before there were shards, resumed under tensor parallelism."""
    monkeypatch.setattr("pgm_scale.checkpoint.fragments.FORMAT", "pgm-scale fragments 1")
    store = commit(tmp_path, [[piece("w", (3, 12), 0, 20)], [piece("w", (3, 12), 20, 16)]])
    values = store.read(1, {("weight", "w"): ((3, 12), [(row_shard(1, 4), 1, 7)])})
    assert values["weight", "w"][0].tolist() == [4, 5, 15, 16, 17, 27 - 20, 28 - 20]


def test_the_same_range_on_two_ranks_is_an_overlap(tmp_path):
    store = commit(tmp_path, [[piece("w", (4,), 0, 4)], [piece("w", (4,), 0, 4)]])
    with pytest.raises(UserError, match="stored twice"):
        store.kinds(1)


@pytest.mark.fault(25)
def test_names_must_match_exactly_and_all_faults_are_listed(tmp_path):
    store = commit(
        tmp_path, [[piece("kept", (4,), 0, 4), piece("old", (2,), 0, 2), piece("wide", (2, 3), 0, 6)]]
    )
    wanted = {
        ("weight", "kept"): ((4,), []),
        ("weight", "new"): ((2,), [(TensorSlice.whole((2,)), 0, 2)]),
        ("weight", "wide"): ((3, 2), []),
        ("ema", "kept"): ((4,), []),
    }
    with pytest.raises(UserError) as caught:
        store.read(1, wanted)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "weight new: missing in the checkpoint",
        "weight wide: shape (2, 3) stored, the model has (3, 2)",
        "ema kept: missing in the checkpoint",
        "weight old: in the checkpoint, not in the model",
    ]


def test_other_kinds_than_the_wanted_may_be_there(tmp_path):
    ema = Fragment("e", TensorSlice.whole((1,)), 0, torch.ones(1))
    store = commit(tmp_path, [[piece("w", (4,), 0, 4), ("ema", ema)]])
    values = store.read(1, {("ema", "e"): ((1,), [(ema.slice, 0, 1)])})
    assert torch.equal(values["ema", "e"][0], torch.ones(1))
    assert store.kinds(1) == {"weight", "ema"}
    with pytest.raises(UserError, match="no 'exp_avg' values"):
        store.read_full(1, "exp_avg")


def test_only_files_and_parts_that_are_needed_are_read(tmp_path, monkeypatch):
    store = commit(tmp_path, [[piece("w", (30,), start, 10)] for start in (0, 10, 20)])
    opened = []
    real = reader_module.safe_open

    def counting(path, framework):
        opened.append(Path(path).name)
        return real(path, framework=framework)

    monkeypatch.setattr(reader_module, "safe_open", counting)
    whole = TensorSlice.whole((30,))
    values = store.read(1, {("weight", "w"): ((30,), [(whole, 12, 3), (whole, 18, 1)])})
    assert [part.tolist() for part in values["weight", "w"]] == [[2, 3, 4], [8]]
    assert opened == ["rank_00001.safetensors"]


def test_a_range_outside_the_shard_is_our_own_bug(tmp_path):
    store = commit(tmp_path, [[piece("w", (4, 2), 0, 8)]])
    with pytest.raises(AssertionError):
        store.read(1, {("weight", "w"): ((4, 2), [(row_shard(0, 2, (4, 2)), 2, 3)])})


def test_a_shard_of_another_tensor_is_our_own_bug(tmp_path):
    store = commit(tmp_path, [[piece("w", (4, 2), 0, 8)]])
    with pytest.raises(AssertionError):
        store.read(1, {("weight", "w"): ((4, 2), [(TensorSlice.whole((8,)), 0, 1)])})
