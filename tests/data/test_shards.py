"""What the writers write is what the readers, and the libraries themselves, read."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pgm_scale.data import Shard, mds
from pgm_scale.data.batch import ShardRows
from pgm_scale.data.manifest import TokenDtype
from pgm_scale.data.readers import read_shard
from pgm_scale.data.writers import write_shard
from pgm_scale.errors import UserError
from tests.data import libraries
from tests.data.conftest import CLASS_NAMES, LENGTH_TOKENS, PIXELS, Split, flip_bit, make_split


def read(split: Split, number: int = 0) -> ShardRows:
    shard = split.manifest.shards[number]
    return read_shard(split.folder / shard.name, shard, split.manifest)


def test_round_trip(split: Split) -> None:
    for number in range(len(split.manifest.shards)):
        tokens_RL, valid_lengths_R, labels_R = read(split, number)
        assert tokens_RL.dtype == np.uint16
        np.testing.assert_array_equal(tokens_RL, split.tokens[number])
        np.testing.assert_array_equal(valid_lengths_R, split.valid_lengths[number])
        assert labels_R is None


def test_pixels_and_labels_round_trip(pixel_split: Split) -> None:
    assert pixel_split.labels is not None
    for number in range(len(pixel_split.manifest.shards)):
        tokens_RL, valid_lengths_R, labels_R = read(pixel_split, number)
        assert labels_R is not None
        assert (tokens_RL.dtype, labels_R.dtype) == (np.uint8, np.uint32)
        np.testing.assert_array_equal(tokens_RL, pixel_split.tokens[number])
        np.testing.assert_array_equal(labels_R, pixel_split.labels[number])
        assert (valid_lengths_R == LENGTH_TOKENS).all()


@pytest.mark.fault(56)
def test_a_label_without_a_class_and_a_shard_without_labels(pixel_split: Split) -> None:
    shard = pixel_split.manifest.shards[0]
    images = dataclasses.replace(PIXELS, class_names=CLASS_NAMES[:2])
    fewer = dataclasses.replace(pixel_split.manifest, images=images)
    with pytest.raises(UserError, match=r"shard-00000\.\w+: .*its row \d+ has label 2 of 2 classes"):
        read_shard(pixel_split.folder / shard.name, shard, fewer)
    tokens_RL, lengths_R = pixel_split.tokens[0], pixel_split.valid_lengths[0]
    format = pixel_split.manifest.format
    unlabelled = write_shard(pixel_split.folder, "bare", format, tokens_RL, lengths_R)
    with pytest.raises(UserError, match=r"bare: not the"):
        read_shard(pixel_split.folder / "bare", unlabelled, pixel_split.manifest)
    labelled = dataclasses.replace(pixel_split.manifest, images=None)
    with pytest.raises(UserError, match=r"shard-00000\.\w+: not the"):
        read_shard(pixel_split.folder / shard.name, shard, labelled)


def test_uint32_round_trip(split: Split) -> None:
    tokens_RL = np.arange(5 * LENGTH_TOKENS, dtype=np.uint32).reshape(5, LENGTH_TOKENS) + 70_000
    shard = write_shard(split.folder, "wide", split.manifest.format, tokens_RL, np.full(5, LENGTH_TOKENS))
    vocabulary = dataclasses.replace(split.manifest.vocabulary, size=80_000)
    manifest = dataclasses.replace(split.manifest, token_dtype="uint32", vocabulary=vocabulary)
    np.testing.assert_array_equal(read_shard(split.folder / "wide", shard, manifest)[0], tokens_RL)


def test_bytes_depend_on_the_rows_alone(split: Split, tmp_path: Path) -> None:
    """Also when a killed attempt left its temporary file behind."""
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / f".{split.manifest.shards[0].name}.writing").write_text("half")
    again = make_split(tmp_path / "again", split.manifest.format)
    assert again.manifest == split.manifest
    names = {path.name for path in split.folder.iterdir()}
    assert names == {path.name for path in again.folder.iterdir()}
    for name in names:
        assert (split.folder / name).read_bytes() == (again.folder / name).read_bytes(), name


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("length_tokens", [1, 5, 16])
@pytest.mark.parametrize("token_dtype", ["uint8", "uint16", "uint32"])
def test_mds_equals_the_library(
    tmp_path: Path, token_dtype: TokenDtype, length_tokens: int, labelled: bool
) -> None:
    """To the byte where it writes; lengths that leave rows unaligned, and rows that are no power of two."""
    rng = np.random.default_rng(length_tokens)
    tokens_RL = rng.integers(0, np.iinfo(token_dtype).max, (37, length_tokens), token_dtype, endpoint=True)
    valid_lengths_R = rng.integers(1, length_tokens + 1, 37).astype(np.uint32)
    labels_R = rng.integers(0, 2**32 - 1, 37, np.uint32, endpoint=True) if labelled else None
    rows = ShardRows(tokens_RL, valid_lengths_R, labels_R)
    libraries.write_mds(tmp_path / "library", rows)
    mds.write_mds(tmp_path / "ours", rows)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()

    split = make_split(tmp_path / "split", "mds", (37,))
    manifest = dataclasses.replace(
        split.manifest,
        token_dtype=token_dtype,
        length_tokens=length_tokens,
        images=PIXELS if labelled else None,
    )
    shard = dataclasses.replace(split.manifest.shards[0], bytes=(tmp_path / "ours").stat().st_size)
    for expected, found in zip(
        libraries.read_mds(tmp_path / "ours", shard, manifest),
        mds.read_mds(tmp_path / "library", shard, manifest),
        strict=True,
    ):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype


def test_mds_beyond_its_offsets_is_refused_before_it_is_written(tmp_path: Path) -> None:
    largest = mds.largest_rows(1024, "uint16", labelled=False)
    tokens_RL = np.broadcast_to(np.uint16(3), (largest + 1, 1024))
    message = rf"{largest + 1} rows exceed the 4 GiB.*--rows-per-shard {largest} or fewer"
    with pytest.raises(UserError, match=message):
        mds.write_mds(tmp_path / "shard", ShardRows(tokens_RL, np.broadcast_to(np.uint32(1), largest + 1)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labelled", [False, True])
def test_the_largest_mds_shard_ends_just_below_4_gib(tmp_path: Path, labelled: bool) -> None:
    """By what a small one needs: its header's text, and for each row 4 bytes of offset and the row itself."""
    labels_R = np.zeros(1, np.uint32) if labelled else None
    mds.write_mds(
        tmp_path / "one", ShardRows(np.zeros((1, 1024), np.uint16), np.ones(1, np.uint32), labels_R)
    )
    row_bytes = 4 + 1024 * 2 + 4 + (4 if labelled else 0)
    fixed_bytes = (tmp_path / "one").stat().st_size - row_bytes
    largest = mds.largest_rows(1024, "uint16", labelled)
    assert fixed_bytes + largest * row_bytes < 1 << 32 <= fixed_bytes + (largest + 1) * row_bytes


def test_streaming_reads_our_mds_folder(tmp_path: Path) -> None:
    from streaming import LocalDataset, StreamingDataset

    split = make_split(tmp_path / "split", "mds")
    tokens, valid_lengths = np.concatenate(split.tokens), np.concatenate(split.valid_lengths)
    local = LocalDataset(str(split.folder))
    streamed = StreamingDataset(local=str(split.folder), batch_size=1, validate_hash="sha256")
    assert len(local) == len(streamed) == len(tokens)
    for row in (0, 299, 300, len(tokens) - 1):
        for dataset in (local, streamed):
            np.testing.assert_array_equal(dataset[row]["tokens"], tokens[row])
            assert dataset[row]["valid_length"] == valid_lengths[row]


def test_the_libraries_read_our_labels(pixel_split: Split) -> None:
    assert pixel_split.labels is not None
    tokens, labels = np.concatenate(pixel_split.tokens), np.concatenate(pixel_split.labels)
    if pixel_split.manifest.format == "mds":
        from streaming import LocalDataset

        samples = list(LocalDataset(str(pixel_split.folder)))
        found_tokens, found_labels = [s["tokens"] for s in samples], [s["label"] for s in samples]
    else:
        import webdataset

        urls = [str(pixel_split.folder / shard.name) for shard in pixel_split.manifest.shards]
        dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
        rows = list(dataset.to_tuple("tokens.npy", "labels.npy").unbatched())
        found_tokens, found_labels = [tokens for tokens, _ in rows], [label for _, label in rows]
    np.testing.assert_array_equal(found_tokens, tokens)
    np.testing.assert_array_equal(found_labels, labels)


def test_webdataset_reads_our_tar(tmp_path: Path) -> None:
    import webdataset

    split = make_split(tmp_path / "split", "tar")
    urls = [str(split.folder / shard.name) for shard in split.manifest.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    rows = list(dataset.to_tuple("tokens.npy", "valid_lengths.npy").unbatched())
    np.testing.assert_array_equal([tokens for tokens, _ in rows], np.concatenate(split.tokens))
    np.testing.assert_array_equal([length for _, length in rows], np.concatenate(split.valid_lengths))


@pytest.mark.fault(20)
def test_truncation_anywhere_is_an_error_even_without_the_hash(split: Split) -> None:
    """A tar that ends at a member boundary, too, which tar readers take for a clean end."""
    path = split.folder / split.manifest.shards[0].name
    content = path.read_bytes()
    boundary = []
    if split.manifest.format == "tar":
        with tarfile.open(path) as archive:
            boundary = [archive.getmembers()[i].offset for i in (1, 2)]
    for cut in [0, 3, 100, 700, *boundary, len(content) // 2]:
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"shard-00000\.\w+: not the \w+ shard"):
            read(split)


@pytest.mark.parametrize("rows", [299, 301])
def test_wrong_row_count_is_an_error(split: Split, rows: int) -> None:
    shard = dataclasses.replace(split.manifest.shards[0], rows=rows)
    with pytest.raises(UserError, match=r"shard-00000"):
        read_shard(split.folder / shard.name, shard, split.manifest)


@pytest.mark.fault(56)
def test_wrong_length_and_token_out_of_vocabulary(split: Split) -> None:
    shard = split.manifest.shards[0]
    longer = dataclasses.replace(split.manifest, length_tokens=LENGTH_TOKENS + 1)
    with pytest.raises(UserError, match="shard-00000"):
        read_shard(split.folder / shard.name, shard, longer)
    vocabulary = dataclasses.replace(split.manifest.vocabulary, size=500)
    smaller = dataclasses.replace(split.manifest, vocabulary=vocabulary)
    with pytest.raises(UserError, match=r"its row \d+ has token \d+, the vocabulary ends at 500"):
        read_shard(split.folder / shard.name, shard, smaller)


def _npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=allow_pickle)
    return content.getvalue()


GOOD = [
    ("000000.tokens.npy", tarfile.REGTYPE, _npy(np.ones((1, LENGTH_TOKENS), np.uint16))),
    ("000000.valid_lengths.npy", tarfile.REGTYPE, _npy(np.ones(1, np.uint32))),
]
PICKLE = _npy(np.array([Path()], dtype=object), allow_pickle=True)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "members",
    [
        [*GOOD, ("../escaped", tarfile.REGTYPE, b"x")],
        [*GOOD, ("/tmp/absolute", tarfile.REGTYPE, b"x")],
        [*GOOD, ("link", tarfile.SYMTYPE, b"")],
        [("000000.tokens.npy", tarfile.LNKTYPE, b""), GOOD[1]],
        [*GOOD, ("null", tarfile.CHRTYPE, b"")],
        [*GOOD, GOOD[0]],
        [GOOD[0], GOOD[0], GOOD[1]],
        [*GOOD, ("000000.evil.pyd", tarfile.REGTYPE, b"cos\nsystem\n.")],
        [("000000.tokens.npy", tarfile.REGTYPE, PICKLE), GOOD[1]],
        [GOOD[0]],
        [],
    ],
)
def test_hostile_tar_is_refused(tmp_path: Path, members: list[tuple[str, bytes, bytes]]) -> None:
    split = make_split(tmp_path / "split", "tar", (1,))
    path = split.folder / split.manifest.shards[0].name

    def write(content: list[tuple[str, bytes, bytes]]) -> Shard:
        with tarfile.open(path, "w") as archive:
            for name, kind, data in content:
                member = tarfile.TarInfo(name)
                member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
                archive.addfile(member, io.BytesIO(data))
        return split.manifest.shards[0]

    assert read_shard(path, write(GOOD), split.manifest)[0].shape == (1, LENGTH_TOKENS)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"shard-00000\.tar: not the tar shard"):
        read_shard(path, write(members), split.manifest)
    assert sorted(tmp_path.rglob("*")) == before


def test_mds_with_wild_offsets_is_refused(tmp_path: Path) -> None:
    split = make_split(tmp_path / "split", "mds", (3,))
    path = split.folder / split.manifest.shards[0].name
    flip_bit(path, offset=11)  # the top byte of the second row's offset
    with pytest.raises(UserError, match=r"shard-00000\.mds.*offsets"):
        read(split)


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = (
        "import sys, pgm_scale.data, pgm_scale.data.loader, pgm_scale.data.writers\n"
        "assert not {'torch', 'streaming', 'webdataset', 'boto3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
