"""Any byte of any file of a run folder that is flipped, cut or put in is found, or changes nothing that is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale import config as configuration
from pgm_scale.checkpoint import CheckpointStore
from pgm_scale.checkpoint.fragments import Kind
from pgm_scale.checkpoint.step_folders import step_name
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.errors import UserError
from pgm_scale.run_folder import RunFolder, load_run
from tests.export.runs import STEP, whole, write_run

OLD, NEW = STEP, STEP + 4
# What nobody reads to load a model or to go on: LATEST, which is repaired, and the presence of first_checkpoint.
UNREAD = {"checkpoints/LATEST", "first_checkpoint"}


class Run:
    """Two steps, with other weights each. No dataclass, of which hypothesis would print all bytes."""

    def __init__(self, root: Path) -> None:
        self.folder = folder = write_run(root, "pgm")
        places, store = RunFolder(folder), CheckpointStore(folder)
        kinds: tuple[Kind, ...] = ("weight", "ema")
        weights = [
            (kind, whole(name, values + 1))
            for kind in kinds
            for name, values in store.read_full(OLD, kind).items()
        ]
        store.save(NEW, weights, {"run_id": places.identity().run_id, "step": NEW})
        data = folder.parent / "data" / "train"
        self.config, self.identity = places.config(), places.identity()
        self.train, self.tokenizer = DatasetManifest.load(data), data / "tokenizer.json"
        self.files = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.loaded = dict(what_is_loaded(folder, step) for step in (OLD, NEW))

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        for name, data in self.files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(data)


def what_is_loaded(folder: Path, step: int | None = None) -> tuple[int, str]:
    """The step, and a hash of all that a reader gets: description, weights, tokenizer."""
    trained = load_run(folder, step=step)
    digest = hashlib.sha256(json.dumps(configuration.to_mapping(trained.description)).encode())
    for name, tensor in trained.model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    digest.update(trained.tokenizer_path.read_bytes())
    assert trained.description.origin.step is not None
    return trained.description.origin.step, digest.hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("bytes"))


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, float, int]:
    """How, where in the file from 0 to 1, and with which byte."""
    how = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
    return how, draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))


def changed(data: bytes, how: str, place: float, byte: int) -> bytes:
    at = int(place * len(data))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ byte]) + data[at + 1 :]
    if how == "cut":
        return data[:at]
    middle = bytes([byte]) if how == "insert" else data[at : at + byte]
    return data[:at] + middle + data[at:]


# Small files as often as the large ones.
names = st.sampled_from(
    [
        "run.json",
        "config.yaml",
        "tokenizer.json",
        "first_checkpoint",
        "checkpoints/LATEST",
        *(
            f"checkpoints/{step_name(NEW)}/{name}"
            for name in ("rank_00000.safetensors", "manifest.json", "state.json")
        ),
    ]
)


@pytest.mark.fault(3)
@pytest.mark.fault(36)
@settings(max_examples=120, deadline=None)
@given(name=names, change=changes())
def test_a_reader_gets_what_was_saved_or_an_error(
    run: Run, name: str, change: tuple[str, float, int]
) -> None:
    run.restore()
    data = changed(run.files[name], *change)
    (run.folder / name).write_bytes(data)
    try:
        step, digest = what_is_loaded(run.folder)
    except UserError:
        assert name not in UNREAD
        return
    assert digest == run.loaded[step]
    assert step == (OLD if step_name(NEW) in name and data != run.files[name] else NEW)


@pytest.mark.fault(36)
@settings(max_examples=120, deadline=None)
@given(name=names, change=changes())
def test_a_resume_goes_on_from_what_was_saved_or_is_refused(
    run: Run, name: str, change: tuple[str, float, int]
) -> None:
    run.restore()
    data = changed(run.files[name], *change)
    (run.folder / name).write_bytes(data)
    places = RunFolder(run.folder)
    try:
        identity = places.create_or_match(run.config, run.train, run.tokenizer)
    except UserError:
        assert name in ("run.json", "config.yaml")
        return
    store = CheckpointStore(run.folder)
    store.recover()
    step = store.newest_verified()
    assert step == (OLD if step_name(NEW) in name and data != run.files[name] else NEW)
    assert identity == run.identity
    assert places.config() == run.config
    assert what_is_loaded(run.folder, step)[1] == run.loaded[step]
    assert (run.folder / "checkpoints" / "LATEST").read_text().rstrip("\n") == step_name(step)
