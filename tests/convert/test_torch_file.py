"""Files of torch.save, both formats: read to the bit, and refused in one line when damaged or forged."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pgm_scale.convert.restricted_pickle import Record
from pgm_scale.convert.torch_file import open_torch_file
from pgm_scale.errors import UserError
from tests.convert import published

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
    )
    made = {
        str(dtype): (torch.randn(3, 5) * 100).to(dtype)
        for dtype in (*kinds, torch.int8, torch.uint8, torch.bool)
    }
    views = {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "row": base[5],
        "scalar": base[2, 3],
    }
    return made | views | {"empty": torch.empty(0, 3), "parameter": torch.nn.Parameter(torch.randn(2))}


def equal_bits(found: Tensor, expected: Tensor) -> bool:
    pair = [t.detach().contiguous().flatten().view(torch.uint8) for t in (found, expected)]
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*pair)


@LEGACY
def test_tensors_are_the_same_to_the_bit(tmp_path: Path, legacy: bool) -> None:
    expected = tensors()
    path = published.save({"state_dict": OrderedDict(expected), "n": 3}, tmp_path / "a.pt", legacy)
    content = open_torch_file(path)
    assert content["n"] == 3
    assert list(content["state_dict"]) == list(expected)
    for name, tensor in expected.items():
        assert equal_bits(content["state_dict"][name], tensor), name
    content["state_dict"]["base"].zero_()  # theirs to change: the file is not
    assert equal_bits(open_torch_file(path)["state_dict"]["base"], expected["base"])


@LEGACY
def test_the_file_may_go_away(tmp_path: Path, legacy: bool) -> None:
    path = published.save({"a": torch.arange(1000.0)}, tmp_path / "a.pt", legacy)
    content = open_torch_file(path)
    path.unlink()
    assert torch.equal(content["a"], torch.arange(1000.0))


def test_plain_pickles(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": [1, "b"]}))
    assert open_torch_file(tmp_path / "a.pkl") == {"a": [1, "b"]}


def content_or_line(path: Path) -> tuple[Any, str]:
    """What the file holds, or else the one line that refuses it."""
    try:
        content = open_torch_file(path)
        repr(content)
    except UserError as error:
        return None, str(error)
    return content, ""


def one_line(path: Path) -> str:
    _, line = content_or_line(path)
    assert str(path) in line
    assert "\n" not in line
    return line


def test_no_checkpoints(tmp_path: Path) -> None:
    one_line(tmp_path / "missing.pt")
    one_line(tmp_path)
    path = tmp_path / "a.pt"
    for content in (
        b"",
        b"PK",
        b"PK\x03\x04",
        b"text\n",
        b"\x80",
        os.urandom(1000),
        b"PK\x03\x04" + bytes(1000),
    ):
        path.write_bytes(content)
        one_line(path)


@LEGACY
@pytest.mark.fault(65)
def test_cut_files(tmp_path: Path, legacy: bool) -> None:
    whole = published.save({"a": torch.randn(40), "b": [1, 2]}, tmp_path / "a.pt", legacy).read_bytes()
    path = tmp_path / "cut.pt"
    for size in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:size])
        one_line(path)


@LEGACY
@pytest.mark.fault(65)
def test_flipped_bits_are_found_or_harmless(tmp_path: Path, legacy: bool) -> None:
    """In the zip format all of them are found but those that change nothing; the legacy one has no checksums."""
    expected: dict[str, Any] = {"a": torch.randn(40), "b": [1, 2]}
    whole = published.save(expected, tmp_path / "a.pt", legacy).read_bytes()
    path, generator = tmp_path / "flipped.pt", random.Random(1)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        found, line = content_or_line(path)
        assert "\n" not in line
        if not legacy and not line:
            assert torch.equal(found["a"], expected["a"])
            assert found["b"] == expected["b"]


def zip_of(
    path: Path, data: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path


def tensor_pickle(
    numel: int = 4,
    offset: int = 0,
    size: tuple[Any, ...] = (4,),
    stride: tuple[Any, ...] = (1,),
    **names: str,
) -> bytes:
    """Of one tensor, as torch writes it; numbers and names are whatever is asked for."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if value is not storage:
                return None
            key = names.get("key", "0")
            return (
                names.get("tag", "storage"),
                named(names.get("storage", "FloatStorage")),
                key,
                "cpu",
                numel,
            )

        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, Rebuilt):
                function = getattr(torch._utils, names.get("function", "_rebuild_tensor_v2"))
                return function, (storage, offset, size, stride, False, OrderedDict())
            return NotImplemented

    class Rebuilt:
        pass

    def named(name: str) -> Any:
        return getattr(torch, name, None) or getattr(torch.storage, name)

    storage, buffer = object(), io.BytesIO()
    Pickler(buffer, 2).dump({"a": Rebuilt()})
    return buffer.getvalue()


def test_a_file_of_our_own_making(tmp_path: Path) -> None:
    """The forged ones below differ from it in one thing each."""
    path = zip_of(tmp_path / "a.pt", tensor_pickle(), {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert open_torch_file(path)["a"].tolist() == [1, 2, 3, 4]


HUGE = 1 << 40
FORGED: dict[str, Callable[[], bytes]] = {
    "size": lambda: tensor_pickle(size=(HUGE,)),
    "sizes whose product is huge": lambda: tensor_pickle(size=(1 << 30, 1 << 30), stride=(0, 0)),
    "a row repeated": lambda: tensor_pickle(size=(HUGE,), stride=(0,)),
    "overflow": lambda: tensor_pickle(size=(1 << 62, 8), stride=(1, 1)),
    "offset": lambda: tensor_pickle(offset=1),
    "negative offset": lambda: tensor_pickle(offset=-1, size=(1,)),
    "negative stride": lambda: tensor_pickle(stride=(-1,)),
    "negative size": lambda: tensor_pickle(size=(-4,)),
    "stride": lambda: tensor_pickle(size=(2,), stride=(HUGE,)),
    "dimensions": lambda: tensor_pickle(size=(1,) * 2000, stride=(1,) * 2000),
    "fractions": lambda: tensor_pickle(size=(1.5,)),
    "integers of a thousand digits": lambda: tensor_pickle(size=(1 << 4000,), stride=(0,)),
    "no stride": lambda: tensor_pickle(stride=()),
    "other storage": lambda: tensor_pickle(key="1"),
    "a path as a key": lambda: tensor_pickle(key="../../../../etc/passwd"),
    "another persistent id": lambda: tensor_pickle(tag="module"),
    "another kind of storage": lambda: tensor_pickle(storage="ComplexFloatStorage"),
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.fault(65)
def test_forged_tensors(tmp_path: Path, name: str) -> None:
    one_line(zip_of(tmp_path / "a.pt", FORGED[name](), {"0": bytes(16)}))


def test_rebuilding_functions_that_are_not_known_stay_records(tmp_path: Path) -> None:
    """They would allocate what a file asks for, or call a function that it names."""
    data = tensor_pickle(function="_rebuild_nested_tensor", size=(HUGE,))
    found = open_torch_file(zip_of(tmp_path / "a.pt", data, {"0": bytes(16)}))
    assert isinstance(found["a"], Record)
    frozen = b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nfrozenset\nN]\x85NtR."
    assert "unknown class" in one_line(zip_of(tmp_path / "c.pt", frozen, {}))
    meta = b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(N(J\xff\xff\xff\x7ft(K\x01tI00\ntR."
    assert isinstance(open_torch_file(zip_of(tmp_path / "b.pt", meta, {})), Record)


@pytest.mark.fault(65)
def test_forged_archives(tmp_path: Path) -> None:
    data, storage = tensor_pickle(), {"0": bytes(16)}
    compressed = zip_of(tmp_path / "a.pt", data, {"0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    assert "compressed" in one_line(compressed)
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("archive/other.pkl", data)
    assert "without data.pkl" in one_line(tmp_path / "b.pt")
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        for content in (data, b"cos\nsystem\n."):
            archive.writestr("archive/data.pkl", content)
    assert "doubled" in one_line(tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", storage["0"])
        archive.writestr("archive/byteorder", "big")
    assert "byte order" in one_line(tmp_path / "d.pt")


@pytest.mark.fault(65)
def test_parts_that_overlap(tmp_path: Path) -> None:
    """The directory of a small file can name the same bytes a million times."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle())
        archive.writestr("archive/data/0", bytes(1 << 16))
        for number in range(1, 9):
            entry = copy.copy(archive.getinfo("archive/data/0"))
            entry.filename = f"archive/data/{number}"
            archive.filelist.append(entry)
    assert "overlap" in one_line(path)


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary.txt",)


class WithState:
    def __init__(self) -> None:
        self.command = Command()

    def __setstate__(self, state: Any) -> None:
        os.system("touch canary.txt")


def infected(value: Any, where: str) -> dict[str, Any]:
    content = published.lightning_content(published.mdlm_state(), None, {}, None)
    if where == "hyper_parameters":
        content["hyper_parameters"] = {"config": {"model": [value]}, "tokenizer": value}
    elif where == "in the place of a tensor":
        content["state_dict"]["backbone.blocks.0.norm1.weight"] = value
    else:
        content["callbacks"] = {"callback": {"state": value}}
    return content


@LEGACY
@pytest.mark.parametrize("where", ["hyper_parameters", "callbacks", "in the place of a tensor"])
@pytest.mark.fault(26)
def test_infected_checkpoints_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary.txt"
    for number, value in enumerate((Command(), WithState())):
        path = published.save(infected(value, where), tmp_path / f"{number}.ckpt", legacy)
        canary.unlink(missing_ok=True)
        content = open_torch_file(path)
        repr(content)
        assert not canary.exists()
        found = content["state_dict"]["backbone.blocks.0.attn_qkv.weight"]
        assert torch.equal(found, published.mdlm_state()["blocks.0.attn_qkv.weight"])
        torch.load(path, weights_only=False)
        assert canary.exists(), "the file is harmless, so the test shows nothing"


@LEGACY
@pytest.mark.fault(26, 65)
def test_random_damage_of_the_pickle_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"a": torch.randn(4), "command": Command(), "config": published.hydra_config()}
    whole = published.save(content, tmp_path / "a.pt", legacy).read_bytes()
    start = whole.index(b"\x80\x02}")
    generator, path = random.Random(2), tmp_path / "b.pt"
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(start, min(len(whole), start + 1500))] = generator.randrange(256)
        if not legacy:
            with zipfile.ZipFile(io.BytesIO(whole)) as archive:
                size = archive.getinfo("a/data.pkl").file_size
            zip_of(path, bytes(damaged[start : start + size]), {"0": bytes(16)})
        else:
            path.write_bytes(damaged)
        assert "\n" not in content_or_line(path)[1]
    assert not (tmp_path / "canary.txt").exists()
