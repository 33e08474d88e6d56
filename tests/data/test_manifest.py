from __future__ import annotations

import dataclasses
import json

import pytest

from pgm_scale.data import DatasetManifest
from pgm_scale.data.manifest import ImageContent, Vocabulary, token_dtype_for
from pgm_scale.errors import UserError
from tests.data.conftest import Split


def test_round_trip_is_exact_and_bytes_are_deterministic(split: Split, tmp_path) -> None:
    loaded = DatasetManifest.load(split.folder)
    assert loaded == split.manifest
    assert loaded.save(tmp_path).read_bytes() == (split.folder / "dataset.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"split", "dataset.json"}


def test_images_round_trip_and_texts_keep_their_bytes(split: Split, pixel_split: Split) -> None:
    assert DatasetManifest.load(pixel_split.folder) == pixel_split.manifest
    assert "images" in json.loads(pixel_split.manifest.to_json())
    assert "images" not in json.loads(split.manifest.to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["cat", "dog", "cat"]}, "two images.class_names are equal"),
        ({"class_names": []}, "images.class_names are not names"),
        ({"class_names": ["cat", 3]}, "images.class_names are not names"),
        ({"tokens": "voxels"}, "images.tokens 'voxels' is neither"),
        ({"tokens": "codes"}, "length_tokens 16, but the codes of an image are 17 tokens"),
        ({"channels": 3}, "length_tokens 16, but the pixels of an image are 48 tokens"),
        ({"grid_side": 2}, "grid_side 2 of pixels is not side_pixels 4"),
        ({"grid_side": "4"}, "images.grid_side is '4', not a positive integer"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
)
def test_garbled_images_are_one_line(pixel_split: Split, change, message) -> None:
    path = pixel_split.folder / "dataset.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"images": content["images"] | change}))
    with pytest.raises(UserError, match=message) as caught:
        DatasetManifest.load(pixel_split.folder)
    assert "\n" not in str(caught.value)


def test_only_pixels_are_stored_as_bytes(split: Split, pixel_split: Split) -> None:
    for wrong in (
        dataclasses.replace(split.manifest, token_dtype="uint8"),
        dataclasses.replace(pixel_split.manifest, token_dtype="uint16"),
    ):
        with pytest.raises(UserError, match=r"token_dtype 'uint\d+' does not fit"):
            DatasetManifest.from_json(wrong.to_json(), "here")
    codes = dataclasses.replace(
        pixel_split.manifest,
        images=ImageContent("codes", 32, 3, 4, ("cat",)),
        vocabulary=Vocabulary(18, 16, 17, 17, None),
        length_tokens=17,
        token_dtype="uint16",
        shards=tuple(dataclasses.replace(s, bytes=3 * s.bytes) for s in pixel_split.manifest.shards),
    )
    assert DatasetManifest.from_json(codes.to_json(), "here") == codes


@pytest.mark.fault(21)
def test_all_missing_shards_are_listed(split: Split) -> None:
    for shard in split.manifest.shards[1:3]:
        (split.folder / shard.name).unlink()
    with pytest.raises(UserError, match=r"2 of 5 shards are missing: shard-00001\.\w+, shard-00002\.\w+;"):
        DatasetManifest.load(split.folder)


@pytest.mark.fault(21)
def test_no_manifest(tmp_path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: cannot read .*No such file"):
        DatasetManifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version 3"),
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


@pytest.mark.fault(27)
@pytest.mark.parametrize("name", ["../shard.mds", "/etc/passwd", "a/b", ".hidden", ""])
def test_shard_names_cannot_leave_the_folder(split: Split, name: str) -> None:
    first = dataclasses.replace(split.manifest.shards[0], name=name)
    bad = dataclasses.replace(split.manifest, shards=(first, *split.manifest.shards[1:]))
    with pytest.raises(UserError, match="bad shard name"):
        DatasetManifest.from_json(bad.to_json(), "here")


@pytest.mark.fault(21)
@pytest.mark.fault(50)
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


def test_image_differences_are_short(split: Split, pixel_split: Split) -> None:
    manifest = pixel_split.manifest
    assert manifest.images is not None
    names = [f"class {n}" for n in range(1000)]

    def with_names(class_names: list[str]) -> DatasetManifest:
        assert manifest.images is not None
        images = dataclasses.replace(manifest.images, class_names=tuple(class_names))
        return dataclasses.replace(manifest, images=images)

    whole = with_names(names)
    assert whole.differences(whole) == []
    assert whole.differences(with_names(names[1:])) == ["images.class_names: 1000 != 999 classes"]
    assert whole.differences(with_names([*names[:7], "x", "y", *names[9:]])) == [
        "images.class_names: class 7 is 'class 7' != 'x'"
    ]
    assert "content: text != images" in split.manifest.differences(manifest)


def test_token_dtype_holds_every_id() -> None:
    assert [token_dtype_for(size) for size in (65_536, 65_537)] == ["uint16", "uint32"]
