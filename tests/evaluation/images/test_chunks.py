"""Chunks of a work folder: shared by ranks, taken up again, and waited for."""

import threading
from pathlib import Path

import numpy as np
import pytest

from pgm_scale.errors import HungRankError, UserError
from pgm_scale.evaluation.images.chunks import ChunkFolder, Columns
from pgm_scale.files import temporary_name
from pgm_scale.parallel.launch import Launch


def _rank(rank: int, world_size: int) -> Launch:
    return Launch("torchrun", rank, world_size, rank, "127.0.0.1", 1)


def _folder(work: Path, **identity: int) -> ChunkFolder:
    return ChunkFolder(work, "numbers", identity, 23, 5)


def _squares(numbers: range) -> Columns:
    return {"squares": np.square(np.array(numbers)), "rows": np.ones((len(numbers), 2), np.float32)}


def test_ranks_fill_every_image_once_and_in_order(tmp_path: Path) -> None:
    made: list[range] = []

    def make(numbers: range) -> Columns:
        made.append(numbers)
        return _squares(numbers)

    for rank in (2, 0, 1):
        _folder(tmp_path).fill(make, _rank(rank, 3), "numbers")
    assert sorted(number for numbers in made for number in numbers) == list(range(23))
    np.testing.assert_array_equal(_folder(tmp_path).column("squares"), np.arange(23) ** 2)
    assert _folder(tmp_path).column("rows").shape == (23, 2)
    made.clear()
    _folder(tmp_path).fill(make, _rank(0, 1), "numbers")
    assert made == []


def test_a_fill_that_dies_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    made: list[range] = []

    def dies(numbers: range) -> Columns:
        if numbers.start == 10:
            raise KeyboardInterrupt
        return _squares(numbers)

    def goes_on(numbers: range) -> Columns:
        made.append(numbers)
        return _squares(numbers)

    with pytest.raises(KeyboardInterrupt):
        _folder(tmp_path).fill(dies, _rank(0, 1), "numbers")
    _folder(tmp_path).fill(goes_on, _rank(0, 1), "numbers")
    assert made == [range(10, 15), range(15, 20), range(20, 23)]
    np.testing.assert_array_equal(_folder(tmp_path).column("squares"), np.arange(23) ** 2)


def test_a_chunk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    temporary_name(folder.path / "00000005-00000010.safetensors").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"cannot write .*00000005-00000010.safetensors \(Is a directory\); make"
    ):
        folder.fill(_squares, _rank(0, 1), "numbers")
    assert folder.has(range(5))


def test_another_identity_is_another_folder(tmp_path: Path) -> None:
    _folder(tmp_path, seed=1).fill(_squares, _rank(0, 1), "numbers")
    assert _folder(tmp_path, seed=1).has(range(5))
    assert not _folder(tmp_path, seed=2).has(range(5))
    assert '"seed": 1' in (_folder(tmp_path, seed=1).path / "identity.json").read_text()


def test_rank_0_waits_for_the_others_and_names_them(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.fill(_squares, _rank(0, 2), "numbers")
    with pytest.raises(HungRankError, match=r"2 of 5 chunks of rank\(s\) 1 are missing: 00000005-00000010"):
        folder.wait(_rank(0, 2), timeout_s=0.3)
    other = threading.Timer(0.5, folder.fill, (_squares, _rank(1, 2), "numbers"))
    other.start()
    folder.wait(_rank(0, 2), timeout_s=60)
    other.join()
    assert len(folder.column("squares")) == 23


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.fill(_squares, _rank(0, 1), "numbers")
    path = folder.path / "00000005-00000010.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"00000005-00000010.safetensors cannot be read .* delete it"):
        folder.column("squares")
    folder.write(range(5, 10), _squares(range(5, 10)))
    (folder.path / "00000000-00000005.safetensors").write_bytes(
        (folder.path / "00000020-00000023.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match=r"00000000-00000005.safetensors does not hold 5 images"):
        folder.column("squares")
