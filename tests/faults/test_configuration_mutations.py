"""Any configuration is valid, or one readable message of the real commands: no traceback, hang or flood."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgm_scale import config as configuration
from pgm_scale.cli import main
from pgm_scale.errors import UserError
from tests.tiny_data import tiny_config, write_tiny_data

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
BASE = "folder: runs/x\ndata: {train: nowhere, validation: nowhere}\n"
_LONGEST_MESSAGE = 10_000


def _whole_configurations() -> list[dict[str, Any]]:
    """Of each shipped file all keys, with their defaults; a distillation needs its teacher."""
    trees = []
    for path in CONFIGS:
        with contextlib.suppress(UserError):
            trees.append(configuration.to_mapping(configuration.load(path)))
    assert len(trees) > 5
    return trees


TREES = _whole_configurations()


def _places(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _places(value, (*prefix, key))


_SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**63 - 1, -(2**63), 10**400])
    | st.floats()
    | st.sampled_from(["", "x", "nan", "1e400", "../..", "a\nb", "\0", "\ud800", "\x1b[2J", "k" * 5000])
    | st.text(max_size=10)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=6,
)


def _told(code: int, errors: str) -> None:
    assert code in (0, 2), errors
    assert "Traceback" not in errors
    assert len(errors) < _LONGEST_MESSAGE
    assert code == 0 or errors.strip()


@pytest.mark.fault(60, 24)
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_any_mutation_is_valid_or_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    tree = copy.deepcopy(data.draw(st.sampled_from(TREES)))
    for _ in range(data.draw(st.integers(1, 3))):
        place, section = data.draw(st.sampled_from(list(_places(tree)))), tree
        for key in place[:-1]:
            section = section[key]
        action = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        value = data.draw(_VALUES) if action == "replace" else section[place[-1]]
        if action != "replace":
            del section[place[-1]]
        if action != "remove":
            section[place[-1] + ("x" if action == "rename" else "")] = value
    path = tmp_path / "config.yaml"
    try:
        path.write_text(yaml.safe_dump(tree))
    except ValueError:  # Python writes no number of so many digits
        return
    code = main(["config", str(path)])
    output, errors = capsys.readouterr()
    _told(code, errors)
    if code == 0:  # what is valid is printed as it is, and stays valid when training looks at its layout
        path.write_text(output)
        assert main(["config", str(path)]) == 0
        assert capsys.readouterr().out == output
        code = main(["train", str(path), "data.train=nowhere", "data.validation=nowhere"])
        _told(code, capsys.readouterr().err)
        assert code == 2


@pytest.mark.fault(60)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.sampled_from(["", "training", "steps", "model", "size", "data", "x", "a" * 300]),
                max_size=4,
            ).map(".".join),
            st.sampled_from(["=", "", "==", " = "]),
            st.text(max_size=8)
            | st.sampled_from(
                ["[" * 500, "{a: 1", "!!int ''", "0x" + "f" * 5000, "&a [*a]", "\udcff", "24:00:00"]
            ),
        ).map("".join),
        max_size=3,
    )
)
def test_any_override_is_valid_or_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BASE)
    given = [text for text in overrides if text and not text.startswith("-")]  # those are options
    code = main(["config", str(path), *given])
    _told(code, capsys.readouterr().err)


_BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "deep list": ((BASE + "x: " + "[" * 9000 + "]" * 9000).encode(), "nested too deeply"),
    "deep mapping": ((BASE + "x: " + "{a: " * 9000 + "1" + "}" * 9000).encode(), "nested too deeply"),
    "aliases of aliases": ((BASE + _BOMB + "name: *a11\n").encode(), "name: expected str, found"),
    "an alias of itself": (
        b"folder: &a [*a]\ndata: &b {train: *b, validation: *b}\n",
        "folder: expected str",
    ),
    "a key twice": ((BASE + "training: {steps: 5, steps: 7}\n").encode(), "'steps' is given twice"),
    "a section twice": ((BASE + "model: {}\nmodel: {}\n").encode(), "'model' is given twice"),
    "a number of 20,000 bits": ((BASE + "name: 0x" + "f" * 5000).encode(), "a number is too large"),
    "an empty number": ((BASE + 'name: !!int ""').encode(), "does not fit its tag"),
    "no boolean": ((BASE + "name: !!bool maybe").encode(), "does not fit its tag"),
    "no time": ((BASE + "name: !!timestamp x").encode(), "does not fit its tag"),
    "code": ((BASE + "name: !!python/object/apply:os.system [touch x]").encode(), "not valid YAML"),
    "a long word": ((BASE + "? " + "k" * 200_000 + "\n: 1\n").encode(), "unknown key"),
    "too long": (BASE.encode() + b"#" * 300_000, "more than"),
    "tabs": (b"folder: x\ndata:\n\ttrain: a\n", "not valid YAML"),
    "UTF-16": (BASE.encode("utf-16"), "not valid YAML"),
    "all bytes": (bytes(range(256)), "not valid YAML"),
    "nothing": (b"", "expected a mapping"),
    "two documents": ((BASE + "---\n" + BASE).encode(), "not valid YAML"),
    "NUL": (b'folder: "a\\0b"\ndata: {train: a, validation: b}\n', "not text"),
    "half a character": ((BASE + 'name: "\\ud800"\n').encode(), "not text"),
}


@pytest.mark.fault(61)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_short_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    for command in (["config"], ["train"], ["doctor"]):
        assert main([*command, str(path)]) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert len(errors) < _LONGEST_MESSAGE
        assert "Traceback" not in errors
    assert not (tmp_path / "x").exists()


@pytest.mark.fault(61, 64)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder", "absent"])
def test_what_is_no_file_is_told_by_the_real_command(tmp_path: Path, kind: str) -> None:
    path = Path(kind) if kind.startswith("/") else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    for command in ("config", "train"):
        finished = subprocess.run(
            [sys.executable, "-m", "pgm_scale.cli", command, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert finished.returncode == 2, finished.stderr
        assert len(finished.stderr.splitlines()) == 1


@pytest.mark.fault(60)
def test_a_run_may_have_any_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "-a b\n'quo\"te' $(x) %s{} ü"
    monkeypatch.chdir(tmp_path)
    data = write_tiny_data(tmp_path / "data")
    config = tiny_config(data, Path(name), training={"steps": 1}, validation={"samples": 0})
    Path("config.yaml").write_text(configuration.to_yaml(config))
    finished = subprocess.run(
        [sys.executable, "-m", "pgm_scale.cli", "train", "config.yaml", "name=-a b"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / name / "checkpoints").is_dir()
    assert main(["sample", f"./{name}", "--steps", "2", "--out", "samples.npy"]) == 0
    assert main(["report", f"./{name}", "--out", "report"]) == 0
    assert main(["export", f"./{name}", "--out", f"./{name}-export"]) == 0
    assert main(["sample", f"./{name}-export", "--steps", "2", "--out", "again.npy"]) == 0
    assert Path("samples.npy").read_bytes() == Path("again.npy").read_bytes()
    assert "Traceback" not in capsys.readouterr().err
