"""Whole preparations of images: what is in the shards, what is left out, and that nothing else decides it."""

import dataclasses
import io
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress

from data_prep import pipeline
from data_prep.image_cli import _usual_size
from data_prep.image_sources import ImageSource, open_images
from data_prep.images import prepare_images, read_rejected
from data_prep.units import Unit, UnitRows
from pgm_scale.data import DatasetManifest
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.files import sha256_file
from pgm_scale.models.vq import VQModel
from pgm_scale.run_folder import RunFolder
from pgm_scale.vq_tokenizer import VQTokenizer
from tests.data_prep.pictures import CARELESS_BAD, published, write_careless_folder, write_folder
from tests.data_prep.small_image_run import options, source
from tests.data_prep.test_cli import run as run_command
from tests.sampling.image_runs import write_image_run

PLAIN = {"augmentation": "none", "size": 16}


def rows_of(output: Path, manifest: DatasetManifest) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of all rows, by the libraries of the formats themselves."""
    folder = output / manifest.split
    if manifest.format == "tar":
        import webdataset

        urls = [str(folder / shard.name) for shard in manifest.shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        return (
            np.concatenate([sample["tokens.npy"] for sample in samples]),
            np.concatenate([sample["labels.npy"] for sample in samples]),
        )
    from streaming import LocalDataset

    samples = list(LocalDataset(str(folder)))
    return np.stack([s["tokens"] for s in samples]), np.array([s["label"] for s in samples])


def all_rows(output: Path, manifests: list[DatasetManifest]) -> list[tuple[bytes, int]]:
    """(tokens, label) of the rows of both splits, sorted."""
    columns = [rows_of(output, manifest) for manifest in manifests]
    return sorted(
        [(t.tobytes(), int(n)) for tokens, labels in columns for t, n in zip(tokens, labels, strict=True)]
    )


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("shard_format", ["tar", "mds"])
def test_a_careless_folder(tmp_path: Path, shard_format: str) -> None:
    """Truncated JPEGs, a CMYK, a 16-bit PNG, a 1 x 1 and a text named .jpg: nothing of the rest is lost."""
    good = write_careless_folder(tmp_path / "in")
    output = tmp_path / "out"
    manifests = prepare_images(source(tmp_path / "in"), options(output, **PLAIN, format=shard_format))
    assert [manifest.split for manifest in manifests] == ["train", "validation"]
    assert sum(manifest.documents for manifest in manifests) == len(good)
    expected = [
        (published(image, 16).tobytes(), ("ant", "bee").index(name.split("/")[0]))
        for name, image in good.items()
    ]
    assert all_rows(output, manifests) == sorted(expected)

    lines = [json.loads(line) for line in (output / "corrupt.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == CARELESS_BAD
    assert len(lines) == len(CARELESS_BAD)
    reasons = {line["name"]: line["reason"] for line in lines}
    assert reasons["ant/text.jpg"] == "not an image of a known kind"
    assert "truncated" in reasons["bee/cut3.jpg"]
    for manifest in manifests:
        assert manifest.images is not None
        assert manifest.images.class_names == ("ant", "bee")
        assert manifest.token_dtype == "uint8"
        assert manifest.length_tokens == 16 * 16 * 3
        storage = SplitStorage(output / manifest.split)
        assert json.loads(storage.tokenizer_path().read_text()) == {"kind": "pixels"}


@pytest.mark.usefixtures("no_processes")
def test_too_many_unreadable_images(tmp_path: Path) -> None:
    good = write_careless_folder(tmp_path / "in")
    total = len(good) + len(CARELESS_BAD)
    strict = options(tmp_path / "out", **PLAIN, max_corrupt_share=4.9 / total)
    with pytest.raises(
        UserError, match=rf"5 of {total} images cannot be read, more than --max-corrupt-share"
    ) as e:
        prepare_images(source(tmp_path / "in"), strict)
    assert "\n" not in str(e.value)
    assert sum(name in str(e.value) for name in CARELESS_BAD) == 3
    assert "and 2 more" in str(e.value)
    assert {entry.name for entry in read_rejected(tmp_path / "out")} == CARELESS_BAD
    allowed = dataclasses.replace(strict, max_corrupt_share=5 / total)
    manifests = prepare_images(source(tmp_path / "in"), allowed)  # goes on from what is there
    assert sum(manifest.documents for manifest in manifests) == len(good)


@pytest.mark.usefixtures("no_processes")
def test_augmentation_is_for_training(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / split, 9) for split in ("train", "validation")]
    images: list[dict[str, list[np.ndarray]]] = [
        {path.parent.name: [] for path in folder.rglob("*.jpg")} for folder in folders
    ]
    for folder, by_class in zip(folders, images, strict=True):
        for path in sorted(folder.rglob("*.jpg")):
            by_class[path.parent.name].append(published(Image.open(path).convert("RGB"), 16))
    names = sorted(images[0])
    plain, mirrored = (
        [
            (square[:, ::step].tobytes(), names.index(n))
            for n, squares in images[0].items()
            for square in squares
        ]
        for step in (1, -1)
    )

    def prepared(augmentation: str) -> list[DatasetManifest]:
        inputs = ImageSource(*(open_images([folder], None) for folder in folders))
        return prepare_images(inputs, options(tmp_path / augmentation, size=16, augmentation=augmentation))

    train, validation = prepared("flip")
    assert all_rows(tmp_path / "flip", [train]) == sorted(plain + mirrored)
    assert (train.documents, train.rows, validation.rows) == (9, 18, 9)
    assert len(all_rows(tmp_path / "flip", [validation])) == 9
    train, validation = prepared("ten-crop")
    assert (train.documents, train.rows, validation.rows) == (9, 90, 9)
    rows = {tokens for tokens, _ in all_rows(tmp_path / "ten-crop", [train])}
    turned = {np.frombuffer(t, np.uint8).reshape(16, 16, 3)[:, ::-1].tobytes() for t in rows}
    assert rows == turned
    assert len(rows) > 45


@pytest.mark.usefixtures("no_processes")
def test_codes(tmp_path: Path, tokenizer: tuple[Path, VQTokenizer]) -> None:
    vq_folder, vq = tokenizer
    folder = write_folder(tmp_path / "in", 80)
    settings = {"size": 16, "augmentation": "none", "vq_path": vq_folder, "batch": 7, "rows_per_shard": 30}
    manifests = prepare_images(source(folder), options(tmp_path / "one", **settings, format="mds"))
    expected = []
    for path in sorted(folder.rglob("*.jpg")):
        codes = vq.encode(published(Image.open(path).convert("RGB"), 16)[None])[0]
        row = np.array([41, *codes], np.uint16)
        expected.append((row.tobytes(), ["ant", "bee", "cow"].index(path.parent.name)))
    assert len({tokens for tokens, _ in expected}) > 60
    assert all_rows(tmp_path / "one", manifests) == sorted(expected)
    train = manifests[0]
    assert (train.vocabulary.size, train.vocabulary.mask_id, train.vocabulary.bos_id) == (42, 40, 41)
    assert train.images is not None
    assert (train.images.tokens, train.images.grid_side, train.length_tokens) == ("codes", 8, 65)
    assert train.tokenizer_sha256 == sha256_file(vq_folder / "tokenizer.json")
    copied = VQTokenizer.load(SplitStorage(tmp_path / "one" / "train").tokenizer_path().parent)
    assert copied.description() == vq.description()


@pytest.mark.usefixtures("no_processes")
def test_a_gpu_encodes_in_the_main_process(
    tmp_path: Path, tokenizer: tuple[Path, VQTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device that says it is none of the workers' but computes here: workers only decode."""
    from data_prep.image_encoding import CodeEncoding

    folder = write_folder(tmp_path / "in", 80)
    settings = PLAIN | {"vq_path": tokenizer[0], "batch": 7}
    on_cpu = prepare_images(source(folder), options(tmp_path / "cpu", **settings))
    decoded: list[int] = []
    start = CodeEncoding.start

    def recorded(encoding: CodeEncoding):
        encode = start(encoding)

        def decode_only(unit: Unit) -> UnitRows:
            rows = encode(unit)
            decoded.append(rows.tokens_RL.shape[1])
            return rows

        return decode_only

    monkeypatch.setattr(CodeEncoding, "start", recorded)
    elsewhere = options(tmp_path / "other", **settings, device="cpu:0")
    manifests = prepare_images(source(folder), elsewhere)
    assert set(decoded) == {16 * 16 * 3}
    assert [m.shards for m in manifests] == [m.shards for m in on_cpu]
    with pytest.raises(UserError, match="device was cpu:0, now cpu"):
        prepare_images(source(folder), dataclasses.replace(elsewhere, device="cpu"))


@pytest.mark.usefixtures("no_processes")
def test_a_finished_output_is_left_alone_and_another_tokenizer_refused(
    tmp_path: Path, tokenizer: tuple[Path, VQTokenizer]
) -> None:
    folder = write_folder(tmp_path / "in", 12)
    settings = PLAIN | {"vq_path": tokenizer[0]}
    first = prepare_images(source(folder), options(tmp_path / "out", **settings))
    assert prepare_images(source(folder), options(tmp_path / "out", **settings)) == first
    other = tmp_path / "vq"
    other.mkdir()
    VQTokenizer(VQModel(tokenizer[1].config)).save(other)
    with pytest.raises(UserError, match=r"tokenizer was .*, now .*; choose another --output"):
        prepare_images(source(folder), options(tmp_path / "out", **settings | {"vq_path": other}))
    with pytest.raises(UserError, match=r"--size 17 is not divisible by 2, the pixels a code"):
        prepare_images(source(folder), options(tmp_path / "new", **settings | {"size": 17}))
    with pytest.raises(UserError, match=r"--size 0.*; --batch 0.*; --max-corrupt-share 2"):
        prepare_images(source(folder), options(tmp_path / "new", size=0, batch=0, max_corrupt_share=2.0))


@pytest.mark.usefixtures("no_processes")
def test_the_commands(
    tmp_path: Path, tokenizer: tuple[Path, VQTokenizer], capsys: pytest.CaptureFixture
) -> None:
    write_careless_folder(tmp_path / "in")
    common = ("--input", tmp_path / "in", "--size", 16, "--validation-share", 0.2, "--max-corrupt-share", 0.4)
    run_command("images", "--output", tmp_path / "pixels", *common, "--channels", 1, "--flip")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert "of 2 class(es)" in printed[0]
    assert printed[2].startswith(
        f"left out 5 unreadable image(s), see {tmp_path / 'pixels' / 'corrupt.jsonl'}: "
    )
    assert DatasetManifest.load(tmp_path / "pixels" / "train").length_tokens == 256
    run_command(
        "imagenet-vq", "--output", tmp_path / "codes", *common, "--vq", tokenizer[0], "--device", "cpu"
    )
    assert "rows of 65 tokens, vocabulary 42" in capsys.readouterr().out
    with pytest.raises(UserError, match="give --train and --validation, or --input"):
        run_command("images", "--output", tmp_path / "x", "--train", tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            run_command(
                "imagenet-vq", "--output", tmp_path / "x", *common, "--vq", tokenizer[0], "--device", "cuda"
            )


@pytest.mark.usefixtures("no_processes")
def test_files_that_cannot_be_read_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dangling link, and bytes of no encoding in the name of a damaged file, which the last line prints."""
    folder = write_folder(tmp_path / "in", 30)
    link = folder / "ant" / "link.jpg"
    link.symlink_to(tmp_path / "absent.jpg")
    Path(os.fsdecode(os.fsencode(folder / "bee") + b"/bad\xff.jpg")).write_bytes(b"not an image")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, unlike pytest's
    monkeypatch.setattr(sys, "stdout", screen)
    arguments = ("--input", folder, "--size", 16, "--validation-share", 0.2, "--max-corrupt-share", 0.1)
    run_command("images", "--output", tmp_path / "out", *arguments)
    screen.seek(0)
    last = screen.read().splitlines()[-1]
    assert last.startswith("left out 2 unreadable image(s)")
    assert "ant/link.jpg (cannot read it: No such file or directory)" in last
    assert "bee/bad\\udcff.jpg (not an image of a known kind)" in last
    reasons = {entry.name: entry.reason for entry in read_rejected(tmp_path / "out")}
    assert reasons.keys() == {"ant/link.jpg", "bee/bad\udcff.jpg"}
    run_command("images", "--output", tmp_path / "out", *arguments)  # is complete
    (tmp_path / "absent.jpg").write_bytes((folder / "ant" / "000.jpg").read_bytes())
    with pytest.raises(UserError, match="prepared differently"):
        run_command("images", "--output", tmp_path / "out", *arguments)


@pytest.mark.usefixtures("no_processes")
def test_every_pass_over_the_images_has_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "in", 30)
    progress = Progress(disable=True)
    monkeypatch.setattr(pipeline, "_progress", lambda shown: progress)
    prepare_images(source(folder), options(tmp_path / "out", **PLAIN))
    bars = [(task.description, task.completed, task.total) for task in progress.tasks]
    assert bars[:3] == [
        ("checking the input files", 30, 30),
        ("surveying the images", 30, 30),
        ("reading images", 30, 30),
    ]


def test_shards_beyond_the_format_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 3)
    large = options(tmp_path / "out", size=1200, format="mds", rows_per_shard=1024)
    with pytest.raises(UserError, match=r"--rows-per-shard 1024: .*; give --rows-per-shard 994 or fewer"):
        prepare_images(source(folder), large)
    assert not (tmp_path / "out").exists()


def test_the_usual_size_is_that_of_a_tokenizers_own_images(tmp_path: Path) -> None:
    run = write_image_run(tmp_path / "run")
    images = RunFolder(run).identity().images
    assert images is not None
    assert _usual_size(Namespace(vq=run)) == images.side_pixels != 256
    assert _usual_size(Namespace(vq=tmp_path / "published.pt")) == 256
    assert _usual_size(Namespace()) == 256
