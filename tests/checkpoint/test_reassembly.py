"""Any partition of any tensors is read by any other partition, and nothing partial is read silently."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.checkpoint import CheckpointStore, Fragment, Kind
from pgm_scale.checkpoint import reader as reader_module
from pgm_scale.errors import UserError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def ranges(size, cuts):
    edges = [0, *sorted(cut % (size + 1) for cut in cuts), size]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


def commit(folder, owned_of_ranks):
    folders = CheckpointStore(folder).folders
    folders.begin(1)
    entries = [folders.write_rank(1, rank, owned) for rank, owned in enumerate(owned_of_ranks)]
    folders.commit(1, entries, {})
    return CheckpointStore(folder)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shapes=st.lists(SHAPES, min_size=1, max_size=4), ranks=st.integers(1, 4))
def test_any_layout_to_any_layout(data, shapes, ranks):
    tensors = {("weight", f"p{i}"): torch.randn(shape) for i, shape in enumerate(shapes)}
    cuts = st.lists(st.integers(0, 200), max_size=5)
    owned_of_ranks: list[list[tuple[Kind, Fragment]]] = [[] for _ in range(ranks)]
    wanted = {}
    for key, tensor in tensors.items():
        for start, length in dict(ranges(tensor.numel(), data.draw(cuts))).items():
            fragment = Fragment(key[1], tuple(tensor.shape), start, tensor.flatten()[start : start + length])
            owned_of_ranks[data.draw(st.integers(0, ranks - 1))].append((key[0], fragment))
        wanted[key] = (tuple(tensor.shape), ranges(tensor.numel(), data.draw(cuts)))
    with tempfile.TemporaryDirectory() as folder:
        store = commit(folder, owned_of_ranks)
        values = store.read(1, wanted)
        whole = store.read_full(1, "weight")
    for key, tensor in tensors.items():
        for (start, length), part in zip(wanted[key][1], values[key], strict=True):
            assert torch.equal(part, tensor.flatten()[start : start + length])
        assert torch.equal(whole[key[1]], tensor)


def piece(name, shape, start, length):
    return ("weight", Fragment(name, shape, start, torch.arange(float(length))))


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
    assert "overlap: stored twice: elements 5 to 6" in message
    assert "short: 9 elements stored, the tensor has 10" in message
    assert "twin: shape (2, 2)" in message
    assert "late: nothing stored for elements 0 to 1" in message


def test_the_same_range_on_two_ranks_is_an_overlap(tmp_path):
    store = commit(tmp_path, [[piece("w", (4,), 0, 4)], [piece("w", (4,), 0, 4)]])
    with pytest.raises(UserError, match="stored twice"):
        store.kinds(1)


def test_names_must_match_exactly_and_all_faults_are_listed(tmp_path):
    store = commit(
        tmp_path, [[piece("kept", (4,), 0, 4), piece("old", (2,), 0, 2), piece("wide", (2, 3), 0, 6)]]
    )
    wanted = {
        ("weight", "kept"): ((4,), []),
        ("weight", "new"): ((2,), [(0, 2)]),
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
    store = commit(tmp_path, [[piece("w", (4,), 0, 4), ("ema", Fragment("e", (1,), 0, torch.ones(1)))]])
    assert torch.equal(store.read(1, {("ema", "e"): ((1,), [(0, 1)])})["ema", "e"][0], torch.ones(1))
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
    values = store.read(1, {("weight", "w"): ((30,), [(12, 3), (18, 1)])})
    assert [part.tolist() for part in values["weight", "w"]] == [[2, 3, 4], [8]]
    assert opened == ["rank_00001.safetensors"]


def test_a_range_outside_the_tensor_is_our_own_bug(tmp_path):
    store = commit(tmp_path, [[piece("w", (4,), 0, 4)]])
    with pytest.raises(AssertionError):
        store.read(1, {("weight", "w"): ((4,), [(2, 3)])})
