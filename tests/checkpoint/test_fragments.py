import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgm_scale.checkpoint.fragments import Fragment, Kind, list_pieces, write_fragments
from pgm_scale.errors import UserError


def test_file_is_plain_safetensors_with_its_hash_and_bits(tmp_path):
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.0])
    owned: list[tuple[Kind, Fragment]] = [
        ("weight", Fragment("a.w", (3, 4), 2, special)),
        ("ema", Fragment("e", (0, 2), 0, torch.zeros(0))),
    ]
    entry = write_fragments(tmp_path / "rank", owned)
    data = (tmp_path / "rank").read_bytes()
    assert (entry.name, entry.bytes, entry.sha256) == ("rank", len(data), hashlib.sha256(data).hexdigest())
    stored = load_file(tmp_path / "rank")
    assert stored.keys() == {"weight/a.w@2", "ema/e@0"}
    assert torch.equal(stored["weight/a.w@2"].view(torch.int32), special.view(torch.int32))
    assert (int.from_bytes(data[:8], "little") + 8) % 8 == 0


def test_names_with_separators_survive(tmp_path):
    name = "odd/na@me.0"
    write_fragments(tmp_path / "rank", [("exp_avg", Fragment(name, (2,), 1, torch.ones(1)))])
    [(key, shape, piece)] = list_pieces(tmp_path / "rank")
    assert (key, shape, piece.start, piece.length) == (("exp_avg", name), (2,), 1, 1)


def test_values_are_written_in_chunks_without_a_copy_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pgm_scale.checkpoint.fragments._CHUNK_BYTES", 64)
    values = torch.arange(1000.0)
    entry = write_fragments(tmp_path / "rank", [("weight", Fragment("w", (1000,), 0, values))])
    assert torch.equal(load_file(tmp_path / "rank")["weight/w@0"], values)
    assert entry.sha256 == hashlib.sha256((tmp_path / "rank").read_bytes()).hexdigest()


@pytest.mark.parametrize("metadata", [None, {"format": "pgm-scale fragments 99"}])
def test_unknown_format_is_refused(tmp_path, metadata):
    save_file({"weight/w@0": torch.ones(1)}, tmp_path / "rank", metadata=metadata)
    with pytest.raises(UserError, match="pgm-scale fragments 1"):
        list_pieces(tmp_path / "rank")


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"\xff" * 8 + b"{}"])
def test_foreign_bytes_are_a_user_error(tmp_path, data):
    (tmp_path / "rank").write_bytes(data)
    with pytest.raises(UserError, match="not a readable fragment file"):
        list_pieces(tmp_path / "rank")


@pytest.mark.parametrize(
    ("start", "values"),
    [(0, torch.ones(2, dtype=torch.float64)), (0, torch.ones(2, 1)), (3, torch.ones(2)), (-1, torch.ones(1))],
)
def test_fragment_must_lie_in_its_tensor(start, values):
    with pytest.raises(AssertionError):
        Fragment("w", (4,), start, values)
