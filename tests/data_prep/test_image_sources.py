"""The same images out of folders, tars and parquet files, with their classes; contradictions in one line."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.image_sources import ImageSource, open_images, read_class_names
from pgm_scale.errors import UserError
from tests.data_prep.pictures import encoded, picture, write_folder

CLASSES = ("ant", "bee", "cow")
JPEGS = [encoded(picture(n)) for n in range(7)]


def write_tar(path: Path, labels: list[int]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            for suffix, data in (("jpg", JPEGS[number]), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, labels: list[Any], struct: bool = True, names: tuple[str, ...] = ()) -> Path:
    contents = JPEGS[: len(labels)]
    images = [{"bytes": content, "path": None} for content in contents] if struct else contents
    table = pa.table({"image": images, "label": labels})
    if names:
        features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=3)
    return path


def labelled(source: ImageSource) -> list[tuple[str, bytes, str]]:
    """(split, content, class name) of all images."""
    found = list(source.images())
    return [(split, image.read(), source.class_names[image.label]) for split, image in found]


def test_folders_tars_and_parquet_give_the_same(tmp_path: Path) -> None:
    labels = [2, 0, 1, 1, 0, 2, 0]
    expected = sorted((content, CLASSES[label]) for content, label in zip(JPEGS, labels, strict=True))
    for number, label in enumerate(labels):
        path = tmp_path / "folder" / CLASSES[label] / "deeper" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEGS[number])
    (tmp_path / "folder" / "ant" / "notes.txt").write_text("not an image, and not named like one")
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncow\n")
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", labels)
    inputs = [
        open_images([tmp_path / "folder"], None),
        open_images([tmp_path / "tars"], names),
        open_images([write_parquet(tmp_path / "a.parquet", labels, names=CLASSES)], None),
        open_images([write_parquet(tmp_path / "b.parquet", labels, struct=False)], names),
    ]
    splits = []
    for images in inputs:
        source = ImageSource(images, 0.3)
        assert source.total() == 7
        found = labelled(source)
        assert source.class_names == CLASSES
        assert sorted((content, name) for _, content, name in found) == expected
        splits.append({content for split, content, _ in found if split == "validation"})
    assert 1 <= len(splits[0]) <= 5
    assert all(split == splits[0] for split in splits)


def test_every_part_of_a_folder_has_all_classes(tmp_path: Path) -> None:
    images = list(open_images([write_folder(tmp_path, 60)], None).images())
    assert len(images) == 60
    for start in range(0, 60, 15):
        assert {image.label for image in images[start : start + 15]} == {0, 1, 2}


def test_images_in_no_folder_are_one_class(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(JPEGS[number])
    images = open_images([tmp_path], None)
    assert images.class_names == ("image",)
    assert [image.label for image in images.images()] == [0, 0, 0]
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(JPEGS[0])
    with pytest.raises(UserError, match=r"0\.jpg: lies beside the folders of classes"):
        open_images([tmp_path], None)


def test_two_inputs_have_the_same_classes(tmp_path: Path) -> None:
    for split, classes in [("train", CLASSES), ("some", CLASSES[1:]), ("other", ("bee", "dog"))]:
        write_folder(tmp_path / split, 6, classes)
    train, some, other = (open_images([tmp_path / name], None) for name in ("train", "some", "other"))
    found = labelled(ImageSource(train, some))
    assert [split for split, _, _ in found] == ["train"] * 6 + ["validation"] * 6
    assert {name for split, _, name in found if split == "validation"} == {"bee", "cow"}
    with pytest.raises(UserError, match=r"class 'dog' is in --validation and not in --train"):
        ImageSource(train, other)
    tar = open_images([write_tar(tmp_path / "a.tar", [0, 1])], None)
    with pytest.raises(UserError, match="--train has a folder and --validation a tar"):
        ImageSource(train, tar)
    named = open_images([write_parquet(tmp_path / "a.parquet", [0], names=CLASSES)], None)
    unnamed = open_images([write_parquet(tmp_path / "b.parquet", [1])], None)
    with pytest.raises(UserError, match="other class names; give them by --class-names"):
        ImageSource(named, unnamed)


def test_classes_without_names_are_named_by_their_numbers(tmp_path: Path) -> None:
    source = ImageSource(
        open_images([write_tar(tmp_path / "a.tar", [0, 4, 1])], None),
        open_images([write_tar(tmp_path / "b.tar", [5])], None),
    )
    assert source.total() is None
    assert [name for _, _, name in labelled(source)] == ["0", "4", "1", "5"]
    assert source.class_names == tuple("012345")


def test_bad_labels_and_names(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n")
    for label in (2, -1):
        images = open_images([write_tar(tmp_path / "a.tar", [0, label])], names)
        message = rf"a\.tar, 001\.jpg: label {label}, but --class-names names 2 classes"
        with pytest.raises(UserError, match=message):
            list(images.images())
    with pytest.raises(UserError, match="label 4000000000, but without --class-names, at most 100000"):
        list(open_images([write_tar(tmp_path / "a.tar", [4_000_000_000])], None).images())
    with pytest.raises(UserError, match=r"b\.parquet, row 2: null in 'label'"):
        list(open_images([write_parquet(tmp_path / "b.parquet", [1, None])], None).images())
    for text, message in [("a\nb\na\n", "'a' is named twice"), ("a\n\nb", "empty line"), ("", "empty line")]:
        names.write_text(text)
        with pytest.raises(UserError, match=message):
            read_class_names(names)
    with pytest.raises(UserError, match="cannot read it"):
        read_class_names(tmp_path / "absent")
    with pytest.raises(UserError, match="folders are named after their classes"):
        open_images([write_folder(tmp_path / "folder")], names)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"], "label": [0]}, "no column 'image' \\(found 'picture', 'label'\\)"),
        ({"image": [b"x"]}, "no column 'label'"),
        ({"image": ["text"], "label": [0]}, "image must be bytes"),
        ({"image": [b"x"], "label": ["cat"]}, "label a whole number"),
    ],
)
def test_other_columns(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        list(open_images([tmp_path], None).images())


def test_inputs_of_several_kinds_or_of_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image \(\.jpg, \.png, \.\.\.\), \.tar or \.parquet"):
        open_images([tmp_path], None)
    with pytest.raises(UserError, match="no such file or folder"):
        open_images([tmp_path / "absent"], None)
    (tmp_path / "a.jpg").write_bytes(JPEGS[0])
    write_tar(tmp_path / "a.tar", [0])
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.tar: images, tars and parquet files are not mixed"):
        open_images([tmp_path], None)
    with pytest.raises(UserError, match="--validation-share 1"):
        ImageSource(open_images([tmp_path / "a.jpg"], None), 1.0)


def test_folders_named_by_numbers_are_in_the_order_of_these(tmp_path: Path) -> None:
    for name in ("10", "2", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(JPEGS[int(name) % 7])
    assert open_images([tmp_path], None).class_names == ("1", "2", "10")
