import dataclasses
import json
import os
from collections import Counter

import numpy as np
import pytest

from data_prep import pipeline
from data_prep.readers import Reading, find_files, read_documents
from data_prep.sources import TextSource, content_hash
from data_prep.text import prepare
from data_prep.tokenizers import encode, open_tokenizer
from pgm_scale.data import DatasetManifest
from pgm_scale.errors import UserError
from pgm_scale.files import sha256_file
from tests.data_prep.conftest import random_text, tree
from tests.data_prep.small_run import options, source

pytestmark = pytest.mark.usefixtures("no_processes")


def rows_of(folder, manifest: DatasetManifest) -> tuple[np.ndarray, np.ndarray]:
    """All rows by the libraries of the formats themselves, not by our reader."""
    if manifest.format == "tar":
        import webdataset

        urls = [str(folder / shard.name) for shard in manifest.shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        return (
            np.concatenate([sample["tokens.npy"] for sample in samples]),
            np.concatenate([sample["valid_lengths.npy"] for sample in samples]),
        )
    from streaming.base.format import reader_from_json

    index = json.loads((folder / "index.json").read_text())
    samples = [
        sample for shard in index["shards"] for sample in map(reader_from_json(str(folder), None, shard).get_item,
                                                              range(shard["samples"]))
    ]  # fmt: skip
    return np.stack([s["tokens"] for s in samples]), np.array([s["valid_length"] for s in samples])


def expected_rows(text_folder, manifest: DatasetManifest, tokenizer) -> list[list[int]]:
    """The published packing of the split's documents, four a unit, by plain lists."""
    texts = [next(read_documents(file, Reading())) for file in find_files([text_folder])]
    lowest = min(map(content_hash, texts))
    validation = {t for t in texts if content_hash(t) <= max(lowest, int(0.1 * 2**64))}
    texts = [text for text in texts if (text in validation) == (manifest.split == "validation")]
    assert manifest.documents == len(texts)
    eos, rows = manifest.vocabulary.eos_id, []
    for start in range(0, len(texts), 4):
        stream = [i for ids in encode(tokenizer, texts[start : start + 4]) for i in [*ids, eos]]
        rows += [[eos, *stream[i : i + 14], eos] for i in range(0, len(stream) - 13, 14)]
    return rows


@pytest.mark.parametrize("shard_format", ["tar", "mds"])
def test_the_output_is_what_the_manifest_says(text_folder, tmp_path, shard_format):
    output = tmp_path / "out"
    manifests = prepare(source(text_folder), options(output, format=shard_format))
    assert sorted(path.name for path in output.iterdir()) == ["train", "validation"]
    for manifest in manifests:
        folder = output / manifest.split
        assert DatasetManifest.load(folder) == manifest
        assert sha256_file(folder / "tokenizer.json") == manifest.tokenizer_sha256
        for shard in manifest.shards:
            assert (shard.bytes, shard.sha256) == (
                (folder / shard.name).stat().st_size,
                sha256_file(folder / shard.name),
            )
        index = {"index.json"} if shard_format == "mds" else set()
        names = {"dataset.json", "tokenizer.json", *(shard.name for shard in manifest.shards)} | index
        assert {path.name for path in folder.iterdir()} == names
        tokens, valid = rows_of(folder, manifest)
        tokenizer = open_tokenizer((folder / "tokenizer.json").read_bytes(), "")
        assert tokens.tolist() == expected_rows(text_folder, manifest, tokenizer)
        assert tokens.dtype == manifest.token_dtype
        assert (valid == 16).all()
        assert manifest.rows == len(tokens)
        assert manifest.tokens == tokens.size
    train, validation = manifests
    assert train.tokenizer_sha256 == validation.tokenizer_sha256
    assert len(train.shards) > 2
    assert [shard.rows for shard in train.shards[:-1]] == [150] * (len(train.shards) - 1)


def test_padded_rows(text_folder, tmp_path):
    manifests = prepare(source(text_folder), options(tmp_path / "out", packing="pad", length_tokens=600))
    assert sum(manifest.rows for manifest in manifests) == 120
    for manifest in manifests:
        tokens, valid = rows_of(tmp_path / "out" / manifest.split, manifest)
        assert manifest.tokens == valid.sum()
        assert len(set(valid.tolist())) > 3
        eos = manifest.vocabulary.eos_id
        for row, count in zip(tokens, valid, strict=True):
            assert row[0] == row[count - 1] == eos
            assert (row[count:] == manifest.vocabulary.pad_id).all()


def test_equal_documents_are_on_one_side(tmp_path):
    texts = [random_text(n % 40, 30) for n in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    text_source = TextSource([tmp_path / "a.txt"], Reading("line"), 0.3)
    sides = {(split, text) for split, text in text_source.documents()}
    assert max(Counter(text for _, text in sides).values()) == 1
    validation = sum(split == "validation" for split, _ in sides)
    assert 4 <= validation <= 20


def test_a_small_input_has_a_validation_split_too(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    text_source = TextSource([tmp_path], Reading("line"), 1e-6)
    assert sorted(split for split, _ in text_source.documents()) == ["train", "train", "validation"]
    with pytest.raises(UserError, match=r"1 different documents are too few.*--documents"):
        TextSource([tmp_path], Reading("file"), 0.01).total_documents()


def test_nothing_in_the_output_depends_on_where_it_lies(text_folder, tmp_path):
    prepare(source(text_folder), options(tmp_path / "a"))
    moved = tmp_path / "moved"
    text_folder.rename(moved)
    os.utime(moved / "000.txt", (1, 1))
    prepare(source(moved), options(tmp_path / "b"))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_completed_output_is_left_alone_and_a_different_one_refused(text_folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    first = prepare(source(text_folder), options(output))
    with monkeypatch.context() as context:
        context.setattr(pipeline, "worker_pool", None)
        assert prepare(source(text_folder), options(output)) == first
        changes = {"length_tokens": 32, "format": "mds", "packing": "pad", "rows_per_shard": 7}
        for key, value in changes.items():
            with pytest.raises(UserError, match=f"{key} was .*, now {value}"):
                prepare(source(text_folder), options(output, **{key: value}))
        with pytest.raises(UserError, match=r"validation_share was 0\.1, now 0\.2"):
            prepare(source(text_folder, 0.2), options(output))
        (text_folder / "000.txt").write_text("changed")
        with pytest.raises(UserError, match=r"input\.sha256 was"):
            prepare(source(text_folder), options(output))
    assert [DatasetManifest.load(output / split) for split in ("train", "validation")] == first


def test_foreign_folders_are_not_touched(text_folder, tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no data set of ours"):
        prepare(source(text_folder), options(tmp_path / "out"))
    assert list(tree(tmp_path / "out")) == ["train/thesis.tex"]


def test_two_writers(text_folder, tmp_path):
    from data_prep.work import only_writer

    output = tmp_path / "out"
    output.mkdir()
    with only_writer(output), pytest.raises(UserError, match="another process is preparing"):
        prepare(source(text_folder), options(output))


def test_bad_options_are_told_at_once(text_folder, tmp_path):
    bad = options(tmp_path / "out", length_tokens=3, rows_per_shard=0)
    with pytest.raises(UserError, match=r"--length 3.*; --rows-per-shard 0"):
        prepare(source(text_folder), dataclasses.replace(bad, workers=-1))
    with pytest.raises(UserError, match="--validation-share 1"):
        source(text_folder, 1.0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="File exists"):
        prepare(source(text_folder), options(tmp_path / "file"))


def test_a_split_without_a_row(text_folder, tmp_path):
    with pytest.raises(UserError, match="too few for one row of 4096 tokens"):
        prepare(source(text_folder), options(tmp_path / "out", length_tokens=4096))


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(text_folder, tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device", "shard")

    with monkeypatch.context() as context:
        context.setattr("numpy.savez", full)
        with pytest.raises(UserError, match=r"No space left on device.*goes on"):
            prepare(source(text_folder), options(tmp_path / "out"))
    prepare(source(text_folder), options(tmp_path / "out"))
    prepare(source(text_folder), options(tmp_path / "other"))
    assert tree(tmp_path / "out") == tree(tmp_path / "other")
