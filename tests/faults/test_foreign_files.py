"""Files of others, cut, flipped, made up, or no files: typed errors in bounded memory, nothing half written."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pgm_scale
from pgm_scale.cli import main
from pgm_scale.convert.torch_file import open_torch_file
from pgm_scale.errors import UserError
from pgm_scale.export.folder import new_folder
from pgm_scale.export.run import ExportRequest, export_run
from pgm_scale.model_folder import CHECKSUMS_NAME, CONFIG_NAME, WEIGHTS_NAME
from pgm_scale.reporting.metrics_file import read_metrics
from pgm_scale.vq_tokenizer import VQTokenizer
from tests.export.runs import write_run

COMMAND = [sys.executable, "-m", "pgm_scale.cli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and its export in `whole`."""
    root = tmp_path_factory.mktemp("foreign")
    write_run(root / "r", "pgm")
    export_run(str(root / "r" / "run"), ExportRequest(str(root / "whole")), lambda _: None)
    return root


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Flipped, cut, put in, doubled or swapped, once to three times."""
    content = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        at, size = generator.randrange(len(content) + 1), generator.choice([1, 1, 2, 8, 64])
        action = generator.randrange(5)
        if action == 0 and at < len(content):
            content[at] ^= 1 << generator.randrange(8)
        elif action == 1:
            del content[at : at + size]
        elif action == 2:
            content[at:at] = generator.randbytes(size)
        elif action == 3:
            content[at:at] = content[at : at + size]
        elif at + 8 <= len(content):
            content[at : at + 8] = generator.choice([b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << 40)])
    return bytes(content)


def refused(act: Callable[[], Any]) -> bool:
    """Whether it is a typed error of one line; any other error fails the test."""
    try:
        act()
    except UserError as error:
        return bool(str(error).strip())
    return False


@pytest.mark.fault(65)
def test_one_flipped_bit_in_any_file_of_an_exported_folder(place: Path, tmp_path: Path) -> None:
    """What is read is refused, but for what config.json may say otherwise; what is not read changes nothing."""
    generator, whole = random.Random(3), place / "whole"
    weights = load_file(whole / WEIGHTS_NAME)
    for path in sorted(whole.iterdir()):
        copy = Path(shutil.copytree(whole, tmp_path / path.name))
        data = bytearray(path.read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (copy / path.name).write_bytes(data)
        is_refused = refused(lambda copy=copy: pgm_scale.load(str(copy)))  # type: ignore[misc]
        assert is_refused or path.name not in (WEIGHTS_NAME, "tokenizer.json", CHECKSUMS_NAME), path.name
        if not is_refused:
            loaded = dict(pgm_scale.load(str(copy)).model.named_parameters())
            assert all(torch.equal(loaded[k.removeprefix("backbone.")], v) for k, v in weights.items())


@pytest.mark.fault(65)
@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME, "tokenizer.json", CHECKSUMS_NAME])
def test_mutations_of_an_exported_folder(place: Path, tmp_path: Path, name: str) -> None:
    generator, copy = random.Random(name), Path(shutil.copytree(place / "whole", tmp_path / "copy"))
    (copy / CHECKSUMS_NAME).unlink()  # else the hash would refuse all before the parser sees them
    data = (place / "whole" / name).read_bytes()
    edge = len(data) if name != WEIGHTS_NAME else 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(60):
        (copy / name).write_bytes(mutated(data[:edge], generator) + data[edge:])
        refused(lambda: pgm_scale.load(str(copy)))
        refused(lambda: load_and_tokenize(copy))


def load_and_tokenize(folder: Path) -> None:
    from pgm_scale.sampling.output import load_tokenizer

    load_tokenizer(folder / "tokenizer.json").encode("w1 w2")


@pytest.mark.fault(65)
def test_a_header_that_claims_exabytes_takes_no_memory(place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place / "whole", tmp_path / "copy"))
    (copy / CHECKSUMS_NAME).unlink()
    head = json.dumps(
        {"backbone.x": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}
    ).encode()
    for size in (len(head), 1 << 40, (1 << 64) - 1):
        (copy / WEIGHTS_NAME).write_bytes(struct.pack("<Q", size) + head)
        assert refused(lambda: pgm_scale.load(str(copy)))
        assert refused(lambda: load_hugging_face(tmp_path, copy / WEIGHTS_NAME))


def load_hugging_face(folder: Path, weights: Path) -> None:
    from pgm_scale.convert.layouts import read_checkpoint

    (folder / "hf").mkdir(exist_ok=True)
    (folder / "hf" / "config.json").write_text("{}")
    shutil.copyfile(weights, folder / "hf" / "model.safetensors")
    read_checkpoint(folder / "hf")


@pytest.mark.fault(65, 26)
@pytest.mark.parametrize("legacy", [False, True])
def test_mutations_of_a_torch_file(tmp_path: Path, legacy: bool) -> None:
    path, generator = tmp_path / "c.pt", random.Random(7)
    content = {
        "state_dict": {f"w{i}": torch.arange(20.0) for i in range(4)},
        "hyper_parameters": {"a": [1, {}]},
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    for _ in range(400):
        path.write_bytes(mutated(data, generator))
        refused(lambda: open_torch_file(path))


@pytest.mark.fault(65, 26)
def test_bombs_of_deflate_are_not_inflated(tmp_path: Path) -> None:
    """1 GB of zeros in 1 MB: of a checkpoint, and of tokens."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as part:
        for _ in range(64):
            part.write(bytes(1 << 20))
    assert refused(lambda: open_torch_file(path))
    saved = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(1 << 24)}}, saved)
    with zipfile.ZipFile(saved) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.infolist():
            archive.writestr(entry.filename, stored.read(entry))
    assert path.stat().st_size < 1 << 20
    assert torch.load(path, weights_only=True), "torch inflates it, which this is about"
    with pytest.raises(UserError, match="refused"):
        VQTokenizer.load(path)


@pytest.mark.fault(65)
def test_arrays_whose_header_lies(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, generator = tmp_path / "known.npy", random.Random(1)
    np.save(path, np.full((2, 16), -1))
    data = path.read_bytes()
    claims = data.replace(b"(2, 16)", b"(1<<9,)").replace(b"(2, 16), }", b"(2, 16), }")
    huge = data.replace(
        b"'shape': (2, 16), }", b"'shape': (99999999999, 16), }"[: len(b"'shape': (2, 16), }")]
    )
    for content in (claims, huge, *(mutated(data, generator) for _ in range(60))):
        path.write_bytes(content)
        code = main(
            [
                "sample",
                str(place / "whole"),
                "--known",
                str(path),
                "--steps",
                "1",
                "--out",
                f"{tmp_path}/o.npy",
            ]
        )
        errors = capsys.readouterr().err
        assert code in (0, 2)
        assert "Traceback" not in errors


@pytest.mark.fault(64)
def test_pipes_and_devices_in_the_place_of_files(place: Path, tmp_path: Path) -> None:
    """A pipe without a writer would be waited for; /dev/zero has no end."""
    pipe, run, folder = tmp_path / "pipe", str(place / "r" / "run"), tmp_path / "hf"
    os.mkfifo(pipe)
    folder.mkdir()
    out = str(tmp_path / "out")
    for source in (str(pipe), "/dev/zero"):
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "config.json").symlink_to(source)
        for arguments in (
            ["convert", source, "--out", out],
            ["convert", str(folder), "--out", out],
            ["report", "--eval", source, "--out", out],
            ["sample", run, "--known", source, "--out", out],
            ["export", run, "--out", out, "--metrics", source],
            ["plan", source, "--length", "8", "--vocab-size", "9"],
        ):
            assert main(arguments) == 2
    assert not Path(out).exists()


@pytest.mark.fault(68)
@pytest.mark.parametrize("special", ["pipe", "link to /dev/null"])
def test_devices_are_not_replaced_by_files(place: Path, tmp_path: Path, special: str) -> None:
    """Root could: a rename takes the name of /dev/null from all others. (So it is not tried on that name.)"""
    path = tmp_path / "special"
    if special == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    before = os.lstat(path)
    run = str(place / "r" / "run")
    for arguments in (
        ["sample", run, "--steps", "1", "--out", str(path)],
        ["eval", run, "--sequences", "2", "--json", str(path)],
        ["convert", run, "--to", "pgm-text", "--out", str(path)],
        ["export", run, "--out", str(path)],
    ):
        assert main(arguments) == 2
    after = os.lstat(path)
    assert (before.st_mode, before.st_rdev, before.st_ino) == (after.st_mode, after.st_rdev, after.st_ino)


@pytest.mark.fault(66)
def test_two_exports_to_one_folder(place: Path, tmp_path: Path) -> None:
    """The second is refused while the first writes; files of two models in one folder would have fitting names."""
    out = tmp_path / "out"
    with new_folder(out) as staged:
        (staged / "of_the_first").write_text("1")
        assert main(["export", str(place / "r" / "run"), "--out", str(out)]) == 2
        assert [path.name for path in staged.iterdir()] == ["of_the_first"]
    assert [path.name for path in out.iterdir()] == ["of_the_first"]


@pytest.mark.fault(66)
def test_an_export_that_is_killed_leaves_nothing_and_can_be_repeated(place: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", str(place / "r" / "run")
    staged = tmp_path / ".out.writing"
    process = subprocess.Popen([*COMMAND, "export", run, "--out", str(out)], stderr=subprocess.PIPE)
    deadline_s = time.monotonic() + 100
    while not (staged.is_dir() and any(staged.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    (staged / "left").write_text("half")
    assert main(["export", run, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in (place / "whole").iterdir()}
    assert not staged.exists()


@pytest.mark.fault(67)
@pytest.mark.parametrize("command", ["export", "convert", "sample", "eval", "report"])
def test_a_full_disk_is_one_line_and_leaves_nothing(place: Path, tmp_path: Path, command: str) -> None:
    run, out = place / "r" / "run", tmp_path / "o" / "out"
    out.parent.mkdir()
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    arguments = {
        "export": ["export", str(run), "--out", str(out)],
        "convert": ["convert", str(run), "--to", "pgm-text", "--out", str(out)],
        "sample": ["sample", str(run), "--steps", "1", "--count", "50", "--out", str(out)],
        "eval": ["eval", str(run), "--sequences", "2", "--json", str(out)],
        "report": ["report", str(copy), "--out", str(out)],
    }[command]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does, so that writes fail
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    finished = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=200, preexec_fn=limit
    )
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    assert "File too large" in finished.stderr or "cannot write" in finished.stderr
    left = [path.relative_to(out.parent) for path in out.parent.rglob("*") if path.is_file()]
    assert all(path.name.startswith(".") for path in left), left  # nothing under a name that is looked for


@pytest.mark.fault(69)
def test_reports_on_metrics_that_are_mutated(tmp_path: Path) -> None:
    path, generator = tmp_path / "metrics.jsonl", random.Random(9)
    records = [{"step": i, "loss": 2.0 / (i + 1), "samples": i, "unix_time_s": 1e9 + i} for i in range(20)]
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    for _ in range(300):
        path.write_bytes(mutated(data, generator))
        if not refused(lambda: read_metrics(path)):
            steps = [record["step"] for record in read_metrics(path)]
            assert steps == sorted(set(steps))
    path.write_bytes(data + data[: len(data) // 2] + b'{"step": 3, "lo')  # resumed, then killed
    assert [record["step"] for record in read_metrics(path)] == list(range(20))


@pytest.mark.fault(69)
def test_evaluations_of_any_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.json"
    texts = [
        "",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        '{"a":' * 5000,
        "1e999",
        "9" * 5000,
        "NaN",
        '"\\ud800"',
        "\xff",
    ]
    result = {
        "generative_perplexity": {"retokenized": {"perplexity": 3.0}},
        "steps": 4,
        "tokens_per_second": 2.0,
    }
    for key, value in (
        ("steps", 1e300),
        ("steps", -1),
        ("steps", 10**400),
        ("run", ["\ud800"]),
        ("run", "\0<b>"),
    ):
        texts.append(json.dumps(result | {key: value}))
    for text in texts:
        path.write_bytes(text.encode("latin1"))
        code = main(["report", "--eval", str(path), "--out", str(tmp_path / "report")])
        errors = capsys.readouterr().err
        assert code in (0, 2), errors
        assert "Traceback" not in errors
