"""Damaged, hostile and changing inputs of `prepare`, and what lies in its work folder when it goes on."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import pipeline
from data_prep.image_sources import ImageSource, open_images
from data_prep.image_tar import read_image_tar
from data_prep.images import ImageOptions, prepare_images, read_rejected
from data_prep.readers import Reading, count_documents, find_files, fingerprint_files, read_documents
from data_prep.text import prepare
from data_prep.tokenizers import encode, load_tokenizer, open_tokenizer, train_bpe, vocabulary_of
from pgm_scale.errors import UserError
from pgm_scale.image_pixels import UnreadableImage, crops, decode
from tests.data.damage import Damage, attempt, damages
from tests.data_prep.conftest import tree
from tests.data_prep.small_run import options, source

DOCUMENTS = [f"document {i}: ünï {'x' * (i * 7 % 50)}" for i in range(60)]


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": DOCUMENTS}), sink, row_group_size=20)
    return sink.getvalue()


TXT = "\n".join(DOCUMENTS).encode()
JSONL = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in DOCUMENTS)
INPUTS = {
    "a.txt": TXT,
    "a.jsonl": JSONL,
    "a.parquet": parquet(),
    "a.txt.gz": gzip.compress(TXT),
    "a.jsonl.zst": zstandard.compress(JSONL),
    "a.parquet.gz": gzip.compress(parquet()),
}


@pytest.mark.fault(59)
@pytest.mark.parametrize("name", INPUTS)
@settings(max_examples=60, deadline=None)
@given(damage=damages(), again=damages())
def test_any_damage_of_texts_is_texts_or_one_line(name: str, damage: Damage, again: Damage) -> None:
    def read(path: Path) -> list[str]:
        (file,) = find_files([path])
        texts = list(read_documents(file, Reading("line")))
        count_documents(file, Reading("line"))
        return texts

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        path.write_bytes(again(damage(INPUTS[name])))
        texts, message = attempt(read, path)
    if message is None:
        assert all(isinstance(text, str) and text.encode() for text in texts if text)
    else:
        assert str(path) in message


def picture(kind: str) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


@pytest.mark.fault(59)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@settings(max_examples=60, deadline=None)
@given(damage=damages(), again=damages())
def test_any_damage_of_an_image_is_pixels_or_a_short_reason(kind: str, damage: Damage, again: Damage) -> None:
    try:
        (square,) = crops(decode(again(damage(picture(kind))), 3), 8)
    except UnreadableImage as error:
        reason = str(error)
    else:
        assert square.shape == (8, 8, 3)
        return
    assert "\n" not in reason
    assert 0 < len(reason) <= 200


def image_tar(format: int) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        for number in range(4):
            name = "n" * (120 if number == 2 and format != tarfile.USTAR_FORMAT else 1)
            for suffix, content in (("jpg", b"x" * 300), ("cls", b"%d" % number)):
                member = tarfile.TarInfo(f"train/{name}{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


@pytest.mark.fault(20)
@pytest.mark.fault(27)
@pytest.mark.fault(59)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=100, deadline=None)
@given(damage=damages(), again=damages())
def test_any_damage_of_a_tar_is_samples_or_one_line(format: int, damage: Damage, again: Damage) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "a.tar"
        path.write_bytes(again(damage(image_tar(format))))
        samples, message = attempt(lambda: list(read_image_tar(path)))
        assert os.listdir(scratch) == ["a.tar"]  # nothing is ever extracted
        if message is None:
            assert all(type(label) is int for _, _, label in samples)
        else:
            assert message.startswith(str(path))


TOKENIZER = train_bpe(["hello world some text " * 20], 300)


@pytest.mark.fault(59)
@settings(max_examples=150, deadline=None)
@given(damage=damages(), identifier=st.none() | st.integers(-(2**33), 2**33) | st.integers(250, 400))
def test_any_damage_of_a_tokenizer_is_a_sane_vocabulary_or_one_line(
    damage: Damage, identifier: int | None
) -> None:
    content = TOKENIZER
    if identifier is not None:  # a wild id in a file that is otherwise whole
        changed = json.loads(content)
        changed["model"]["vocab"]["z"] = identifier
        content = json.dumps(changed).encode()

    def use(path: Path) -> int:
        tokenizer = open_tokenizer(load_tokenizer(str(path)), str(path))
        vocabulary = vocabulary_of(tokenizer, "pad", str(path))
        ids = [i for text in encode(tokenizer, ["hello some text ünï\0"]) for i in text]
        assert all(0 <= i < vocabulary.size for i in ids)
        return vocabulary.size

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        path.write_bytes(content if identifier is not None else damage(content))
        size, message = attempt(use, path)
    assert message is not None or size <= 2**24


@pytest.mark.fault(54)
def test_a_zstd_bomb_is_unpacked_in_pieces(tmp_path: Path) -> None:
    """Four bytes of a run-length block are 128 KiB: 32 KiB of them a GiB."""
    block = (0 | 1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"a"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x38" + block * 8192)
    (file,) = find_files([path])
    tracemalloc.start()
    try:
        first = next(read_documents(file, Reading("file")))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert set(first) == {"a"}
    assert peak_bytes < 300 << 20


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.fault(52)
@pytest.mark.parametrize("make", [make_fifo, make_device, make_loop])
def test_inputs_that_are_no_files(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "a.parquet", "a.txt.gz", "a.png"):
        make(folder / name)
    for name in ("a.txt", "a.txt.gz", "a.parquet"):
        with pytest.raises(UserError, match=rf"{name}: (not a plain file or a folder|no such file)"):
            find_files([folder / name])
    files = find_files([folder])
    with pytest.raises(UserError, match=r"cannot read it \((not a plain file|Too many levels)"):
        fingerprint_files(files)
    for file in files:
        with pytest.raises(UserError, match=r"cannot read it \((not a plain file|Too many levels)"):
            list(read_documents(file, Reading()))


@pytest.mark.fault(52)
@pytest.mark.usefixtures("no_processes")
def test_images_that_are_no_files_are_left_out_and_named(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / "in" / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    make_fifo(folder / "fifo.png")
    make_device(folder / "device.png")
    settings = ImageOptions(
        output=tmp_path / "out", size=8, workers=1, show_progress=False, max_corrupt_share=0.2
    )
    prepare_images(ImageSource(open_images([tmp_path / "in"], None), 0.2), settings)
    reasons = {entry.name: entry.reason for entry in read_rejected(tmp_path / "out")}
    assert reasons == dict.fromkeys(("cat/fifo.png", "cat/device.png"), "cannot read it: not a plain file")


class Stop(BaseException):
    pass


def stopped_before(stage: str, text_folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preparation that dies where `pipeline.<stage>` would start."""

    def die(*arguments: object, **named: object) -> None:
        raise Stop

    with monkeypatch.context() as context:
        context.setattr(pipeline, stage, die)
        with pytest.raises(Stop):
            prepare(source(text_folder), options(output))


@pytest.mark.fault(51)
@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("what", ["shard", "tokenizer", "unit", "cut unit", "plan"])
def test_what_a_killed_run_left_is_damaged_before_it_goes_on(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    prepare(source(text_folder), options(whole))
    stopped_before("_make_shards" if what != "shard" else "DatasetManifest", text_folder, output, monkeypatch)
    work = output / ".prepare"
    path = {
        "shard": work / "train" / "shard-00000.tar",
        "tokenizer": work / "tokenizer.json",
        "plan": work / "plan.json",
    }.get(what, work / "units" / "train-0000003.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if what not in ("cut unit", "plan") else content[:40])
    if what in ("shard", "tokenizer"):  # made again
        prepare(source(text_folder), options(output))
        assert tree(output) == tree(whole)
        return
    advice = rf"{path}: damaged.*delete {work}" if what == "plan" else rf"{path}: damaged since .*delete it"
    with pytest.raises(UserError, match=advice) as caught:
        prepare(source(text_folder), options(output))
    assert "\n" not in str(caught.value)
    if what == "plan":
        shutil.rmtree(work)
    else:
        path.unlink()
    prepare(source(text_folder), options(output))
    assert tree(output) == tree(whole)


@pytest.mark.fault(53)
@pytest.mark.usefixtures("no_processes")
def test_an_input_that_changes_while_it_is_read(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_units = pipeline._encode_units

    def change_and_encode(*arguments: object) -> object:
        with open(text_folder / "050.txt", "a") as file:
            file.write(" and more")
        return encode_units(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as context:
        context.setattr(pipeline, "_encode_units", change_and_encode)
        with pytest.raises(UserError, match="the input changed while it was read, so nothing of it is kept"):
            prepare(source(text_folder), options(tmp_path / "out"))
    assert tree(tmp_path / "out") == {}
    prepare(source(text_folder), options(tmp_path / "out"))
    prepare(source(text_folder), options(tmp_path / "other"))
    assert tree(tmp_path / "out") == tree(tmp_path / "other")
