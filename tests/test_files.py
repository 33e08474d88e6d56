import hashlib
import os

import pytest

from pgm_scale.files import atomic_write_bytes, sha256_file


def test_replaces_whole_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.json"
    for data in (b"old", b"new and longer"):
        atomic_write_bytes(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a.json"]
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


def test_a_death_before_the_rename_keeps_the_old_bytes(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write_bytes(path, b"old")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
