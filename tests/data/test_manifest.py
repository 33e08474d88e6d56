from __future__ import annotations

import dataclasses
import json

import pytest

from pgm_scale.data import DatasetManifest
from pgm_scale.data.manifest import token_dtype_for
from pgm_scale.errors import UserError
from tests.data.conftest import Split


def test_round_trip_is_exact_and_bytes_are_deterministic(split: Split, tmp_path) -> None:
    loaded = DatasetManifest.load(split.folder)
    assert loaded == split.manifest
    assert loaded.save(tmp_path).read_bytes() == (split.folder / "dataset.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"split", "dataset.json"}


def test_all_missing_shards_are_listed(split: Split) -> None:
    for shard in split.manifest.shards[1:3]:
        (split.folder / shard.name).unlink()
    with pytest.raises(UserError, match=r"2 of 5 shards are missing: shard-00001\.\w+, shard-00002\.\w+;"):
        DatasetManifest.load(split.folder)


def test_no_manifest(tmp_path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: cannot read .*No such file"):
        DatasetManifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"format": "parquet"}, "neither mds nor tar"),
        ({"rows": 5}, "rows 5, but its shards have 432"),
        ({"token_dtype": "uint32"}, "does not fit 1001 tokens"),
        ({"vocabulary": {"size": 1001}}, "missing 4 required positional arguments"),
        ({"length_tokens": "16"}, "length_tokens is '16', not a positive integer"),
        ({"shards": []}, "names no shards"),
        ({"shards": 3}, "not iterable"),
        ({"extra": 3}, "unexpected keyword argument 'extra'"),
    ],
)
def test_garbled_manifest_is_one_line_that_names_the_file(split: Split, change, message) -> None:
    path = split.folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        DatasetManifest.load(split.folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../shard.mds", "/etc/passwd", "a/b", ".hidden", ""])
def test_shard_names_cannot_leave_the_folder(split: Split, name: str) -> None:
    first = dataclasses.replace(split.manifest.shards[0], name=name)
    bad = dataclasses.replace(split.manifest, shards=(first, *split.manifest.shards[1:]))
    with pytest.raises(UserError, match="bad shard name"):
        DatasetManifest.from_json(bad.to_json(), "here")


def test_truncated_or_binary_manifest(split: Split) -> None:
    path = split.folder / "dataset.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not valid JSON"):
        DatasetManifest.load(split.folder)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        DatasetManifest.load(split.folder)


def test_differences(split: Split) -> None:
    manifest = split.manifest
    vocabulary = dataclasses.replace(manifest.vocabulary, mask_id=3)
    other = dataclasses.replace(manifest, vocabulary=vocabulary, length_tokens=8, split="validation")
    assert manifest.differences(manifest, same_data=True) == []
    assert manifest.differences(other) == ["vocabulary.mask_id: 1000 != 3", "length_tokens: 16 != 8"]
    fewer = dataclasses.replace(manifest, shards=manifest.shards[1:])
    assert manifest.differences(fewer) == []
    count, first = manifest.differences(fewer, same_data=True)
    assert count == "shards: 5 != 4"
    assert first.startswith("shards: 4 differ, the first is Shard(name='shard-00000.")


def test_token_dtype_holds_every_id() -> None:
    assert [token_dtype_for(size) for size in (65_536, 65_537)] == ["uint16", "uint32"]
