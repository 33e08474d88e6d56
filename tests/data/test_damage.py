"""Whatever is damaged in a split folder is found on every run, or changes nothing that is trained on."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.data import DatasetManifest
from pgm_scale.data.loader import TokenLoader
from pgm_scale.data.order import GlobalOrder
from pgm_scale.data.readers import read_shard
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from tests.data.conftest import LENGTH_TOKENS, Split, make_pixel_split, make_split
from tests.data.damage import Damage, attempt, damages

ROWS = (5, 3)
SHARDS = {"mds": "shard-00001.mds", "tar": "shard-00001.tar"}
HARMLESS = {"index.json"}  # only mosaicml-streaming reads it, not we


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    folder = tmp_path_factory.mktemp("splits")
    return {
        "mds": make_split(folder / "mds", "mds", ROWS),
        "tar": make_split(folder / "tar", "tar", ROWS),
        "pixels": make_pixel_split(folder / "pixels", "mds", ROWS),
    }


def everything(folder: Path) -> tuple[DatasetManifest, bytes, list[bytes]]:
    """All that a run uses of a split."""
    storage = SplitStorage(folder)
    loader = TokenLoader(storage, GlobalOrder(storage.manifest.rows_per_shard, 3, 2))
    batch = loader.read(np.arange(storage.manifest.rows))
    arrays = [batch.tokens_BL, batch.valid_BL, np.asarray(batch.labels_B)]
    return storage.manifest, storage.tokenizer_path().read_bytes(), [array.tobytes() for array in arrays]


def refused(folder: Path) -> str | None:
    """The one line, or None if the split can be used."""
    return attempt(everything, folder)[1]


@pytest.mark.fault(19)
@pytest.mark.fault(20)
@pytest.mark.fault(21)
@pytest.mark.parametrize("kind", ["mds", "tar", "pixels"])
@settings(max_examples=150, deadline=None)
@given(damage=damages(), data=st.data())
def test_any_damage_of_any_file_is_found_on_every_run_or_changes_nothing(
    splits: dict[str, Split], kind: str, damage: Damage, data: st.DataObject
) -> None:
    good = splits[kind].folder
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "split"
        shutil.copytree(good, folder)
        name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
        path = folder / name
        changed = damage(path.read_bytes())
        is_changed = changed != path.read_bytes()
        path.write_bytes(changed)
        message = refused(folder)
        assert message == refused(folder)
        if message is None:
            assert everything(folder) == everything(good)
            assert not is_changed or name in HARMLESS or name == "dataset.json"  # its white space
        else:
            assert name in message


@pytest.mark.fault(50)
@pytest.mark.parametrize("kind", ["mds", "pixels"])
def test_every_flipped_bit_of_the_manifest(splits: dict[str, Split], kind: str) -> None:
    """All of them, not a sample: what is read is the manifest that was written, or nothing."""
    manifest = splits[kind].manifest
    content = manifest.to_json().encode()
    taken = 0
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            try:
                text = flipped.decode()
            except UnicodeDecodeError:
                continue  # `load` refuses it
            read, _ = attempt(DatasetManifest.from_json, text, "here")
            assert read in (None, manifest), (place, bit)
            taken += read is not None
    assert taken < len(content)  # white space for white space


@pytest.mark.fault(50)
def test_a_manifest_that_was_edited_says_so(splits: dict[str, Split]) -> None:
    for old, new in [('"mask_id": 1000', '"mask_id": 999'), ('"bos_id": 7', '"bos_id": 5'), ("wrap", "pad")]:
        text = splits["mds"].manifest.to_json()
        assert old in text
        with pytest.raises(
            UserError, match="here: it is not what was written: its sha256 is of other content"
        ):
            DatasetManifest.from_json(text.replace(old, new), "here")


def test_manifests_of_the_version_before_the_hash_are_read(splits: dict[str, Split]) -> None:
    tree = json.loads(splits["mds"].manifest.to_json())
    del tree["sha256"]
    assert DatasetManifest.from_json(json.dumps(tree | {"format_version": 1}), "x") == splits["mds"].manifest
    with pytest.raises(UserError, match="not what was written"):
        DatasetManifest.from_json(json.dumps(tree), "x")
    with pytest.raises(UserError, match="unexpected keyword argument 'sha256'"):
        DatasetManifest.from_json(splits["mds"].manifest.to_json().replace('version": 2', 'version": 1'), "x")


WILD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    2**63,
    10**400,
    "",
    "x",
    "\ud800",
    [],
    {},
]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [p for key, value in items for p in places(value, (*path, key))]


@pytest.mark.fault(50)
@pytest.mark.parametrize("kind", ["mds", "pixels"])
def test_wild_values_in_a_manifest_without_a_hash(splits: dict[str, Split], kind: str) -> None:
    """Of the older version, so that only the checks of the fields stand in their way: every place, every value."""
    tree = json.loads(splits[kind].manifest.to_json())
    del tree["sha256"]
    whole = json.dumps(tree | {"format_version": 1})
    for place in places(json.loads(whole)):
        for value in WILD:
            changed = json.loads(whole)
            parent = changed
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = value
            manifest, message = attempt(DatasetManifest.from_json, json.dumps(changed), "here")
            if message is not None:
                assert len(message) < 500
                continue
            GlobalOrder(manifest.rows_per_shard, 1, 2).locate(np.arange(3))
            assert manifest.differences(manifest, same_data=True) == []
            ids = manifest.vocabulary.mask_id, manifest.vocabulary.bos_id, manifest.vocabulary.eos_id
            assert all(type(token) is int and 0 <= token < manifest.vocabulary.size for token in ids)


@pytest.mark.fault(50)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"rows": 3, "rows": 4}', "the key 'rows' comes twice"),
        ('{"rows": NaN}', "NaN is no number of JSON"),
        ("\0" * 100, "not valid JSON"),
        ("null", "expected a JSON object"),
        ('{"format_version": true}', "format_version True"),
    ],
)
def test_json_that_the_standard_library_would_take_or_stumble_over(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"here: .*{message}") as caught:
        DatasetManifest.from_json(text, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.fault(20)
@pytest.mark.fault(27)
@pytest.mark.parametrize("kind", ["mds", "tar", "pixels"])
@settings(max_examples=120, deadline=None)
@given(damage=damages(), again=damages())
def test_a_damaged_shard_whose_hash_is_right_is_rows_or_one_line(
    splits: dict[str, Split], kind: str, damage: Damage, again: Damage
) -> None:
    """As if whoever damaged it wrote the manifest too."""
    split = splits[kind]
    shard = split.manifest.shards[1]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / shard.name
        path.write_bytes(again(damage((split.folder / shard.name).read_bytes())))
        rows, message = attempt(read_shard, path, shard, split.manifest)
        if message is not None:
            assert shard.name in message
        else:
            assert rows.tokens_RL.shape == (shard.rows, LENGTH_TOKENS)
            assert rows.tokens_RL.max() < split.manifest.vocabulary.size
            assert 1 <= rows.valid_lengths_R.min() <= rows.valid_lengths_R.max() <= LENGTH_TOKENS


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000, 16)}",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (-1, 16)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 16)}",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1, 16)",
        "(" * 5000,
        "\\\n" * 30,
    ],
)
def test_an_array_of_another_shape_than_promised_is_not_allocated(tmp_path: Path, header: str) -> None:
    split = make_split(tmp_path / "split", "tar", (1,))
    path = split.folder / split.manifest.shards[0].name
    with tarfile.open(path, "w") as archive:
        for name in ("000000.tokens.npy", "000000.valid_lengths.npy"):
            member = tarfile.TarInfo(name)
            content = npy(header) + bytes(64)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=r"shard-00000\.tar: not the tar shard") as caught:
        read_shard(path, split.manifest.shards[0], split.manifest)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(58)
@pytest.mark.parametrize("kind", ["mds", "tar"])
def test_a_shard_that_is_cut_while_its_rows_are_in_use(tmp_path: Path, kind: str) -> None:
    """They were read, not mapped: a mapped file that is cut ends the process with SIGBUS."""
    split = make_split(tmp_path / "split", "mds" if kind == "mds" else "tar", (200, 40))
    storage = SplitStorage(split.folder)
    loader = TokenLoader(storage, GlobalOrder(storage.manifest.rows_per_shard, 0, 1, shuffle=False))
    first = loader.read(np.arange(100)).tokens_BL
    for shard in storage.manifest.shards:
        with open(split.folder / shard.name, "r+b") as file:
            file.truncate(700)
    np.testing.assert_array_equal(first, split.tokens[0][:100])
    np.testing.assert_array_equal(loader.read(np.arange(100, 200)).tokens_BL, split.tokens[0][100:])
    with pytest.raises(UserError, match=rf"{SHARDS[kind]}: corrupt: 700 bytes instead of"):
        loader.read(np.arange(200, 240))


def wild_id(name: str, value: Any) -> dict[str, Any]:
    return {name: value}


def test_the_format_bounds_what_a_manifest_may_claim(splits: dict[str, Split]) -> None:
    manifest = splits["mds"].manifest
    wild: list[tuple[dict[str, Any], str]] = [
        ({"length_tokens": 2**40}, "cannot hold 5 rows"),
        ({"documents": 2**54}, "documents is 18014398509481984, not a positive integer below"),
        ({"vocabulary": dataclasses.replace(manifest.vocabulary, size=2**25)}, "vocabulary.size .* is above"),
        (
            {"vocabulary": dataclasses.replace(manifest.vocabulary, **wild_id("mask_id", 1.0))},
            "mask_id 1.0 is no id",
        ),
        (
            {"vocabulary": dataclasses.replace(manifest.vocabulary, **wild_id("bos_id", None))},
            "bos_id None is no id",
        ),
        ({"tokenizer_sha256": "0"}, "bad tokenizer_sha256"),
        ({"packing": 3}, "packing is 3, not text"),
    ]
    for changes, message in wild:
        with pytest.raises(UserError, match=message):
            DatasetManifest.from_json(dataclasses.replace(manifest, **changes).to_json(), "here")
