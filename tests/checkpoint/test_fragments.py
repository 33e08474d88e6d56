import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgm_scale.checkpoint.fragments import Fragment, Kind, list_pieces
from pgm_scale.checkpoint.writing import write_fragments
from pgm_scale.errors import UserError
from pgm_scale.tensor_slices import TensorSlice


def test_file_is_plain_safetensors_with_its_hash_and_bits(tmp_path):
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.0])
    owned: list[tuple[Kind, Fragment]] = [
        ("weight", Fragment("a.w", TensorSlice.whole((3, 4)), 2, special)),
        ("ema", Fragment("e", TensorSlice.whole((0, 2)), 0, torch.zeros(0))),
    ]
    entry = write_fragments(tmp_path / "rank", owned)
    data = (tmp_path / "rank").read_bytes()
    assert (entry.name, entry.bytes, entry.sha256) == ("rank", len(data), hashlib.sha256(data).hexdigest())
    stored = load_file(tmp_path / "rank")
    assert stored.keys() == {"weight/a.w@2", "ema/e@0"}
    assert torch.equal(stored["weight/a.w@2"].view(torch.int32), special.view(torch.int32))
    assert (int.from_bytes(data[:8], "little") + 8) % 8 == 0


SLICES = [TensorSlice.whole((4, 2)), TensorSlice((4, 2), 1, 1, 2), TensorSlice((4, 2), 0, 0, 8)]


@pytest.mark.parametrize("name", ["odd/na@me.0", "a@1", "a@1:2", "new\nline", "@", "w"])
@pytest.mark.parametrize("slice_", SLICES)
def test_names_with_separators_survive(tmp_path, name, slice_):
    fragment = Fragment(name, slice_, min(1, slice_.numel), torch.ones(min(2, slice_.numel)))
    write_fragments(tmp_path / "rank", [("exp_avg", fragment)])
    [(key, piece)] = list_pieces(tmp_path / "rank")
    assert key == ("exp_avg", name)
    assert (piece.slice, piece.start, piece.length) == (slice_, fragment.start, len(fragment.values))


def test_a_shard_has_its_slice_in_the_key(tmp_path):
    fragment = Fragment("w", TensorSlice((4, 6), 2, 3, 6), 5, torch.ones(7))
    write_fragments(tmp_path / "rank", [("ema", fragment)])
    assert load_file(tmp_path / "rank").keys() == {"ema/w@2:3:6@5"}


def test_a_name_that_reads_as_a_slice_is_our_own_bug(tmp_path):
    with pytest.raises(AssertionError, match="reads as a slice"):
        write_fragments(tmp_path / "rank", [("ema", Fragment("w@0:1:2", SLICES[0], 0, torch.ones(1)))])


@pytest.mark.parametrize("step", [1, 3])
def test_values_are_written_in_chunks_without_a_copy_of_the_whole(tmp_path, monkeypatch, step):
    monkeypatch.setattr("pgm_scale.checkpoint.host_buffers.CHUNK_BYTES", 4096)
    values = torch.arange(20_000.0)[::step]
    whole = TensorSlice.whole(values.shape)
    entry = write_fragments(tmp_path / "rank", [("weight", Fragment("w", whole, 0, values))])
    assert torch.equal(load_file(tmp_path / "rank")["weight/w@0"], values)
    assert entry.sha256 == hashlib.sha256((tmp_path / "rank").read_bytes()).hexdigest()


def save_as(path, version, keys, shapes):
    """A file as another writer would make it."""
    metadata = {"format": f"pgm-scale fragments {version}", "shapes": json.dumps(shapes)}
    save_file({key: torch.ones(length) for key, length in keys.items()}, path, metadata=metadata)


def test_version_1_is_read(tmp_path):
    save_as(tmp_path / "rank", 1, {"weight/a@b@3": 5}, {"a@b": [2, 4]})
    [(key, piece)] = list_pieces(tmp_path / "rank")
    assert key == ("weight", "a@b")
    assert (piece.slice, piece.start, piece.length) == (TensorSlice.whole((2, 4)), 3, 5)


@pytest.mark.parametrize(
    "key",
    ["weight/w", "w@0", "weight/w@-1", "weight/w@4", "weight/v@0", "weight/w@0:9:8@0", "weight/w@0:3:3@0"],
)
def test_keys_that_make_no_sense_are_a_user_error(tmp_path, key):
    save_as(tmp_path / "rank", 2, {key: 5}, {"w": [2, 4]})
    with pytest.raises(UserError, match="not a readable fragment file"):
        list_pieces(tmp_path / "rank")


def test_values_of_two_dimensions_are_a_user_error(tmp_path):
    metadata = {"format": "pgm-scale fragments 2", "shapes": '{"w": [2, 4]}'}
    save_file({"weight/w@0": torch.ones(2, 4)}, tmp_path / "rank", metadata=metadata)
    with pytest.raises(UserError, match="not a readable fragment file"):
        list_pieces(tmp_path / "rank")


@pytest.mark.parametrize("metadata", [None, {"format": "pgm-scale fragments 99"}])
def test_unknown_format_is_refused(tmp_path, metadata):
    save_file({"weight/w@0": torch.ones(1)}, tmp_path / "rank", metadata=metadata)
    with pytest.raises(UserError, match=r"pgm-scale fragments 1.*pgm-scale fragments 2"):
        list_pieces(tmp_path / "rank")


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"\xff" * 8 + b"{}"])
def test_foreign_bytes_are_a_user_error(tmp_path, data):
    (tmp_path / "rank").write_bytes(data)
    with pytest.raises(UserError, match="not a readable fragment file"):
        list_pieces(tmp_path / "rank")


@pytest.mark.parametrize("slice_", [TensorSlice.whole((4,)), TensorSlice((4, 2), 0, 1, 2)])
@pytest.mark.parametrize(
    ("start", "values"),
    [(0, torch.ones(2, dtype=torch.float64)), (0, torch.ones(2, 1)), (3, torch.ones(2)), (-1, torch.ones(1))],
)
def test_fragment_must_lie_in_its_shard(slice_, start, values):
    with pytest.raises(AssertionError):
        Fragment("w", slice_, start, values)
