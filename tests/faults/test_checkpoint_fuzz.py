"""What the parsers of a run folder make of bytes that nobody wrote: a value of theirs, or their own error, soon."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.checkpoint import CheckpointStore, RunLock
from pgm_scale.checkpoint.fragments import FORMAT
from pgm_scale.checkpoint.manifest import Manifest
from pgm_scale.checkpoint.reader import build_index
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.errors import UserError
from pgm_scale.holder import Holder
from pgm_scale.run_folder import RunFolder, RunIdentity
from pgm_scale.training.metrics import MetricsFile
from pgm_scale.watching.heartbeat import Heartbeat
from tests.checkpoint.support import save_step, step_folder

pytestmark = pytest.mark.fault(38)

DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 400 + b"]" * 400]
numbers = (
    st.sampled_from([0, -1, 1 << 31, 1 << 63, 10**30, 10**400, 1e308, 0.5, float("nan"), float("inf")])
    | st.integers()
)
texts = st.text(max_size=12) | st.sampled_from(
    ["\ud800", "\x00", "../x", "a\nb", "step_00000001", "9" * 5000]
)


def nested(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    return tree


values = st.recursive(
    st.none() | st.booleans() | numbers | texts | st.sampled_from([nested(300), {}, []]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def replaced(draw: st.DrawFn, tree: Any) -> Any:
    """A tree with one of its values, at any depth, replaced, dropped, or with one more beside it."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(tree)))
        match draw(st.sampled_from(["into", "into", "drop", "add"])):
            case "into":
                return {**tree, key: replaced(draw, tree[key])}
            case "drop":
                return {name: value for name, value in tree.items() if name != key}
            case "add":
                return {**tree, draw(texts): draw(values)}
    if isinstance(tree, list) and tree and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], replaced(draw, tree[at]), *tree[at + draw(st.integers(0, 1)) :]]
    return draw(values)


@st.composite
def json_bytes(draw: st.DrawFn, tree: Any) -> bytes:
    """Of a changed tree; or of the tree, with bytes of it changed."""
    if draw(st.booleans()):
        return json.dumps(replaced(draw, tree)).encode()
    data = json.dumps(tree).encode()
    at, until = draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))
    middle = draw(st.binary(max_size=8) | st.sampled_from([data[until:], *DEEP]))
    return data[:at] + middle + data[draw(st.sampled_from([at, at + 1, until])) :]


def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


ENTRIES = [
    {"name": name, "bytes": 9, "sha256": "0" * 64} for name in ("rank_00000.safetensors", "state.json")
]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_manifest_with_a_true_seal(data: Any) -> None:
    """As somebody would forge it: hashes keep no one from it."""
    body = replaced(data.draw, {"version": 1, "step": 3, "files": ENTRIES})
    sealed = {"checkpoint": body, "sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}
    content = (json.dumps(sealed, indent=1) + "\n").encode()
    try:
        manifest = Manifest.from_bytes(content)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert manifest.to_bytes() == content
    assert all(entry.bytes >= 0 for entry in manifest.files)
    with folder() as place:
        step_folder(Path(place), 3).mkdir(parents=True)
        (step_folder(Path(place), 3) / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match="none is usable"):
            CheckpointStore(place).newest_verified()


def rank_file(header: Any, values_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(values_bytes)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), claimed=st.none() | st.sampled_from([0, 1, 1 << 20, 1 << 40, (1 << 64) - 1]))
def test_a_rank_file(data: Any, claimed: int | None) -> None:
    """Whose bytes are those that the manifest says: the header is checked as if there were none."""
    shapes = replaced(data.draw, {"w": [2, 3], "b": [3]})
    key = data.draw(
        st.sampled_from(["weight/w@0", "weight/w@9", "ema/w@0:1:3@0", "weight/w@0:3:2@0", "w", "x/w@0"])
    )
    header = {
        "__metadata__": {"format": FORMAT, "shapes": json.dumps(shapes)},
        key: {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},
        "weight/b@0": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]},
    }
    if data.draw(st.booleans()):
        header = replaced(data.draw, header)
    content = rank_file(header, 36)
    if claimed is not None:
        content = claimed.to_bytes(8, "little") + content[8:]
    with folder() as place:
        path = Path(place) / "rank_00000.safetensors"
        path.write_bytes(content)
        try:
            index = build_index([path])
        except UserError as error:
            assert "rank_00000" in str(error) or "do not make whole" in str(error)  # noqa: PT017
            return
    assert index.shapes.keys() == index.pieces.keys()


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=40) | st.sampled_from([b"step_00000001", b"step_99999999\n", b"x" * 100_000])
)
def test_a_marker(content: bytes) -> None:
    with folder() as place:
        save_step(Path(place), 1, 1)
        (Path(place) / "checkpoints" / "LATEST").write_bytes(content)
        assert CheckpointStore(place).newest_verified() == 1


IDENTITY = dataclasses.asdict(
    RunIdentity("0123456789ab", Vocabulary(24, 23, 0, 0, None), 16, "0" * 64, "1" * 64)
)


@settings(max_examples=200, deadline=None)
@given(content=json_bytes(IDENTITY))
def test_an_identity(content: bytes) -> None:
    with folder() as place:
        run = RunFolder(place)
        run.identity_path.write_bytes(content)
        try:
            identity = run.identity()
        except UserError as error:
            assert str(run.identity_path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            return
    assert isinstance(identity, RunIdentity)


@settings(max_examples=100, deadline=None)
@given(content=json_bytes({"embedding": 0.5, "block": 0.25}))
def test_unit_costs(content: bytes) -> None:
    with folder() as place:
        run = RunFolder(place)
        run.unit_costs_path.write_bytes(content)
        try:
            costs = run.unit_costs(["embedding", "block"], dict)
        except UserError as error:
            assert "delete it to measure the costs again" in str(error)  # noqa: PT017
            return
    assert all(float(costs[kind]) >= 0 for kind in ("embedding", "block"))


@settings(max_examples=150, deadline=None)
@given(
    content=json_bytes({"step": 1, "loss": 2.5, "validation_perplexity": 12.5}), tail=st.binary(max_size=20)
)
def test_a_log(content: bytes, tail: bytes) -> None:
    """A line is a record or left out; what follows it in the log stays readable."""
    with folder() as place:
        path = Path(place) / "metrics.jsonl"
        path.write_bytes(b'{"step": 0}\n' + content + b"\n" + tail)
        log = MetricsFile(path, 3)
        log.write({"step": 4})
        log.close()
        steps = [json.loads(line)["step"] for line in path.read_bytes().splitlines()]
    assert steps[0] == 0
    assert steps[-1] == 4
    assert all(step <= 3 for step in steps[:-1])


HEARTBEAT = json.loads(
    Heartbeat("r", "training", 1, 9, 1.0, 1.0, 60.0, 1, 0, "h", 7, loss=1.5, run_id="0").to_bytes()
)


@settings(max_examples=200, deadline=None)
@given(content=json_bytes(HEARTBEAT))
def test_a_heartbeat(content: bytes) -> None:
    try:
        heartbeat = Heartbeat.from_bytes(content)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert isinstance(heartbeat.step, int)
    heartbeat.to_bytes()


@settings(max_examples=100, deadline=None)
@given(content=json_bytes(dataclasses.asdict(Holder.here())))
def test_a_lock(content: bytes) -> None:
    with folder() as place:
        lock = RunLock(place, heartbeat_interval_s=0.002, dead_after_s=0.006)
        lock.path.write_bytes(content)
        try:
            with lock:
                lock.check()
        except UserError as error:
            assert "is in use by another run" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
