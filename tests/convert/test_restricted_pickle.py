"""Pickles read as data: equal to pickle's own values where these are plain, and nothing a file names is run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pgm_scale.convert import restricted_pickle
from pgm_scale.convert.restricted_pickle import PickleError, Record


def read(data: bytes) -> Any:
    return restricted_pickle.load(io.BytesIO(data))


PLAIN: list[Any] = [
    None,
    True,
    [1, -1, 255, 65_536, 2**31, -(2**63), 10**40, 1.5, float("inf"), 3 + 2j],
    ["", "text", "ünï \U0001f600", "a\nb'\"\\", b"", b"bytes\x00\xff", "x" * 70_000, b"y" * 70_000],
    {"a": {"b": [{}, [], (), ((),)]}, 3: (1, 2, 3, 4), (1, "a"): {1, 2}, b"k": frozenset({3})},
    OrderedDict([("b", 1), ("a", 2)]),
    defaultdict(list, {"a": [1]}),
    [[0] * 2000, {str(i): i for i in range(2000)}],
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values_are_those_of_pickle(value: Any, protocol: int) -> None:
    found = read(pickle.dumps(value, protocol))
    assert found == value
    if not isinstance(value, dict):
        assert type(found) is type(value)


def test_shared_and_recursive_containers() -> None:
    inner: list[Any] = [1]
    inner.append(inner)
    found = read(pickle.dumps({"a": inner, "b": inner}))
    assert found["a"] is found["b"]
    assert found["a"][1] is found["a"]


def test_foreign_objects_are_records() -> None:
    class_of_the_file = Namespace(lr=1e-4, names=["a"])
    found = read(pickle.dumps({"args": class_of_the_file, "kind": Path, "path": Path("a/b")}))
    args = found["args"]
    assert isinstance(args, Record)
    assert (args.path, args.args, args.state) == ("argparse.Namespace", (), {"lr": 1e-4, "names": ["a"]})
    assert (found["kind"].module[:7], found["kind"].args) == ("pathlib", None)
    assert found["path"].args == ("a", "b")


class ByReduce:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


COMMAND = "touch canary.txt"


def text(value: str) -> bytes:
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


SYSTEM, ARGUMENT = b"cos\nsystem\n", text(COMMAND)
EVALUATED = text(f"__import__('os').system({COMMAND!r})")
SETS_STATE = text("__setstate__") + SYSTEM  # an attribute, of which pickle then calls
# Python's own reader runs the command of each of these.
ATTACKS = {
    "REDUCE": SYSTEM + ARGUMENT + b"\x85R.",
    "REDUCE, protocol 0": b"cposix\nsystem\n(V" + COMMAND.encode() + b"\ntR.",
    "INST": b"(S'" + COMMAND.encode() + b"'\nios\nsystem\n.",
    "OBJ": b"(" + SYSTEM + ARGUMENT + b"o.",
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + ARGUMENT + b"\x85R.",
    "STACK_GLOBAL with dots": b"\x80\x04"
    + text("shutil")
    + text("os.system")
    + b"\x93"
    + ARGUMENT
    + b"\x85R.",
    "BUILD": b"ctypes\nSimpleNamespace\n)\x81}" + SETS_STATE + b"sb" + ARGUMENT + b"b.",
    "BUILD of slots": b"cargparse\nNamespace\n)\x81N}" + SETS_STATE + b"s\x86b" + ARGUMENT + b"b.",
    "getattr": b"cbuiltins\ngetattr\n(cos\n__dict__\n"
    + text("get")
    + b"tR("
    + text("system")
    + b"tR"
    + ARGUMENT
    + b"\x85R.",
    "eval": b"cbuiltins\neval\n" + EVALUATED + b"\x85R.",
    "eval by its old name": b"c__builtin__\neval\n" + EVALUATED + b"\x85R.",
    "a call of a call": b"cfunctools\npartial\n" + SYSTEM + ARGUMENT + b"\x86R)R.",
    "an argument of what is known": b"ccollections\nOrderedDict\n(" + SYSTEM + ARGUMENT + b"\x85R1N.",
    "map": b"ccollections\nOrderedDict\ncbuiltins\nmap\n" + SYSTEM + b"]" + ARGUMENT + b"a\x86R\x85R.",
    "default factory": b"coperator\ngetitem\nccollections\ndefaultdict\ncfunctools\npartial\n"
    + SYSTEM
    + ARGUMENT
    + b"\x86R\x85R"
    + text("a")
    + b"\x86R.",
    "append": b"ctypes\nSimpleNamespace\n)\x81}" + text("append") + SYSTEM + b"sb" + ARGUMENT + b"a.",
    "nested": pickle.dumps({"hyper_parameters": {"config": [ByReduce(COMMAND)]}}),
    "from_type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + SYSTEM + b"N" + ARGUMENT + b"\x85NtR.",
}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary.txt"


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.fault(26)
def test_attacks_run_nothing(canary: Path, name: str) -> None:
    with suppress(PickleError, TypeError, ValueError):  # of which `open_torch_file` makes one line
        repr(read(ATTACKS[name]))
    assert not canary.exists()
    with suppress(Exception):
        pickle.loads(ATTACKS[name])
    assert canary.exists(), "it is harmless, so this shows nothing"


@pytest.mark.fault(26)
def test_names_are_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real: Callable[..., Any] = __import__

    def noted(name: str, *rest: Any) -> Any:
        imported.append(name)
        return real(name, *rest)

    monkeypatch.setattr("builtins.__import__", noted)
    read(b"cantigravity\nfly\n)R.")
    assert "antigravity" not in imported


BOMBS = {
    "memo": b"Nr\xff\xff\xff\xff.",  # LONG_BINPUT: pickle makes an array as long
    "bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "long": b"\x8b\xff\xff\xff\x7f1.",
    "text": b"X\xff\xff\xff\xffa.",
    "decimal": b"L" + b"9" * 100_000 + b"L\n.",
    "frozensets": b"(" + b"K\x01" * 100_000 + b"tq\x00" + b"cbuiltins\nfrozenset\nh\x00\x85R" * 2000 + b".",
    "tuples as keys": b"}(" + b"N" + b"q\x00h\x00h\x00\x86" * 60 + b"Nu.",
    "long tuples as keys": b"}((" + b"N" * 100 + b"tNu.",
    "large integers as keys": b"}(\x8a\x20" + b"\x01" * 32 + b"Nu.",
    "complex numbers as keys": b"}(cbuiltins\ncomplex\n)RNu.",
    "a long name": b"c" + b"a" * 2000 + b"\nb\n.",
    "calls of calls": b"ca\nb\n" + b")R" * 1000 + b".",
    "marks": b"(" * 1000 + b".",
    "extension": b"\x82\x01.",
    "persistent": b"Pid\n.",
    "no end": b"N",
    "nothing": b"",
    "nothing on the stack": b".",
    "items of nothing": b"(u.",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.fault(26, 65)
def test_bombs_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_pickle, "_MOST_COPIED_BYTES", 1 << 23)
    if name == "memo":
        assert read(BOMBS[name]) is None
        return
    with pytest.raises((PickleError, ValueError, LookupError)):
        read(BOMBS[name])


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_pickle, "_MOST_OPERATIONS", 100)
    assert len(read(b"(" + b"]" * 90 + b"t.")) == 90
    with pytest.raises(PickleError, match="100 operations"):
        read(b"(" + b"]" * 110 + b"t.")


@pytest.mark.fault(26, 65)
def test_random_programs_end_in_a_value_or_an_error(canary: Path) -> None:
    """Opcodes in any order, with the names of attacks in between."""
    generator = random.Random(7)
    pieces = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes if opcode.arg is None]
    pieces += [b"cos\nsystem\n", b"\x8c\x10touch canary.txt", b"K\x01", b"h\x00", b"q\x00", b"\x8c\x02os"]
    pieces += [b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n", b")\x81", b"\x85R"]
    ended = 0
    for _ in range(5000):
        program = b"".join(generator.choices(pieces, k=generator.randrange(1, 30))) + b"."
        try:
            repr(read(program))
            ended += 1
        except (PickleError, ValueError, LookupError, TypeError):
            pass
    assert ended > 100
    assert not canary.exists()
