"""A folder that is not whole is refused in one line that names the file; nothing else is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pgm_scale
from pgm_scale.errors import UserError
from pgm_scale.export.run import ExportRequest, export_run
from pgm_scale.model_folder import CHECKSUMS_NAME, CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, read_weights
from tests.export.runs import STEP, write_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    run = write_run(root / "r", "pgm")
    export_run(str(run), ExportRequest(str(root / "whole")), lambda _: None)
    export_run(str(run), ExportRequest(str(root / "shards"), max_shard_bytes=8000), lambda _: None)
    return root


@pytest.fixture
def whole(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / "whole", tmp_path / "whole"))


@pytest.fixture
def shards(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / "shards", tmp_path / "shards"))


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pgm_scale.load(str(folder), **options)
    assert "\n" not in str(caught.value)


def edit_config(folder: Path, *keys: str, value: Any) -> None:
    tree = json.loads((folder / CONFIG_NAME).read_text())
    inner = tree
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / CONFIG_NAME).write_text(json.dumps(tree))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "tokenizer.json"])
@pytest.mark.parametrize("place", [-1, -40])
@pytest.mark.fault(65)
def test_a_flipped_byte(whole: Path, name: str, place: int) -> None:
    pgm_scale.load(str(whole))
    flip(whole / name, place)
    refused(whole, f"{name} is damaged: its bytes are not those of {CHECKSUMS_NAME}; copy or export")


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
@pytest.mark.fault(65)
def test_a_cut_file(whole: Path, kept: int) -> None:
    data = (whole / WEIGHTS_NAME).read_bytes()
    (whole / WEIGHTS_NAME).write_bytes(data[:kept])
    refused(whole, rf"cannot read .*{WEIGHTS_NAME}: .*; copy or export the folder again")


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "tokenizer.json"])
def test_a_missing_file(whole: Path, name: str) -> None:
    (whole / name).unlink()
    refused(whole, f"cannot read .*{name}.*; copy or export the folder again")


def test_a_missing_shard(shards: Path) -> None:
    pgm_scale.load(str(shards))
    victim = sorted(shards.glob("model-*"))[1]
    victim.unlink()
    refused(shards, f"cannot read .*{victim.name}.*; copy or export the folder again")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}'])
def test_a_garbled_index(shards: Path, text: str) -> None:
    (shards / INDEX_NAME).write_text(text)
    refused(shards, f"{INDEX_NAME} is damaged .*; copy or export the folder again")


def test_garbled_checksums(whole: Path) -> None:
    (whole / CHECKSUMS_NAME).write_text("0" * 64 + "  ../tokenizer.json\n")
    refused(whole, f"{CHECKSUMS_NAME} is damaged")


def test_a_folder_without_checksums_is_loaded(whole: Path) -> None:
    """As other programs write it."""
    (whole / CHECKSUMS_NAME).unlink()
    pgm_scale.load(str(whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"backbone.new": torch.zeros(2)}), "new: unknown to the model"),
        (
            lambda t: t.pop("backbone.vocab_embed.embedding"),
            r"vocab_embed.embedding: missing, the model has \(24, 16\)",
        ),
        (
            lambda t: t.update({"backbone.vocab_embed.embedding": torch.zeros(16, 24)}),
            r"vocab_embed.embedding: shape \(16, 24\), the model has \(24, 16\)",
        ),
    ],
)
@pytest.mark.fault(25)
def test_weights_of_another_model(whole: Path, change: Any, message: str) -> None:
    (whole / CHECKSUMS_NAME).unlink()
    tensors = load_file(whole / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, whole / WEIGHTS_NAME)
    with pytest.raises(UserError, match=f"does not fit the model:\n  {message}$"):
        pgm_scale.load(str(whole))


@pytest.mark.fault(25)
def test_a_name_of_another_program(whole: Path) -> None:
    save_file({"model.weight": torch.zeros(2)}, whole / WEIGHTS_NAME)
    refused(whole, r"model\.weight does not start with backbone\.")
    with pytest.raises(UserError, match="does not start"):
        read_weights(whole)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("model_type",), "gpt2", "is not of an exported model .no model_type pgm_scale."),
        (("description",), None, "is damaged: description: expected a mapping"),
        (("description", "model", "kind"), "gpt", "is damaged: description.model.kind"),
        (("description", "model", "num_heads"), 0, "is damaged: model.num_heads: 0 must be at least 1"),
        (("description", "model", "num_heads"), 3, "is damaged: .*not divisible by model.num_heads 3"),
        (
            ("description", "model", "hidden_size"),
            "16",
            "is damaged: .*hidden_size: expected int, found '16'",
        ),
        (
            ("description", "vocabulary", "mask_id"),
            24,
            "is damaged: vocabulary: an id is not below the size 24",
        ),
        (("description", "length_tokens"), 0, "is damaged: length_tokens: 0 must be from 1 to 1048576"),
        (
            ("description", "length_tokens"),
            1 << 50,
            "is damaged: length_tokens: .* must be from 1 to 1048576",
        ),
        (
            ("description", "model", "surprise"),
            1,
            "is damaged: .*surprise: unknown key.*the release that wrote",
        ),
        (("description", "model", "num_encoder_blocks"), 10**9, "is damaged: .* is more than 4096"),
        (("description", "model", "hidden_size"), 1 << 62, "is damaged: model.hidden_size: .* is more than"),
        (("description", "vocabulary", "size"), 1 << 62, "is damaged: vocabulary.size: .* is more than"),
        (("description", "model", "dropout"), 10**400, "is damaged: .*dropout: expected float"),
    ],
)
@pytest.mark.fault(65)
def test_a_config_that_is_no_model(whole: Path, keys: tuple[str, ...], value: Any, message: str) -> None:
    edit_config(whole, *keys, value=value)
    refused(whole, message)


def test_a_folder_of_another_release_says_which(whole: Path) -> None:
    edit_config(whole, "pgm_scale_version", value="9.1")
    pgm_scale.load(str(whole))
    edit_config(whole, "description", "sampler", "new_setting", value=1)
    refused(whole, r"\(of pgm-scale 9\.1\) is damaged: .*new_setting: unknown key")


def test_a_grid_that_rows_do_not_fill(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "image_pgm")
    export_run(str(run), ExportRequest(str(tmp_path / "m")), lambda _: None)
    edit_config(tmp_path / "m", "description", "images", "grid_side", value=10**9)
    refused(tmp_path / "m", "is not BOS and a grid of 1000000000 a side")


@pytest.mark.fault(65)
def test_a_config_that_asks_for_too_much_takes_no_memory(whole: Path) -> None:
    """Shapes are compared before the model is built: this one would have 10^12 weights."""
    edit_config(whole, "description", "model", "hidden_size", value=1 << 18)
    with pytest.raises(UserError, match="does not fit the model"):
        pgm_scale.load(str(whole))


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\x00", "{}", "[" * 100_000])
@pytest.mark.fault(65)
def test_a_config_that_is_no_json(whole: Path, text: str) -> None:
    (whole / CONFIG_NAME).write_text(text)
    refused(whole, r"cannot read .*config\.json|is not of an exported model")


def test_steps_and_weights_that_it_has_not(whole: Path) -> None:
    assert pgm_scale.load(str(whole), step=STEP).description.origin.step == STEP
    refused(whole, f"is the export of step {STEP}; leave out the step", step=1)
    refused(whole, "holds averaged weights only", weights="weight")
    refused(whole / "nowhere", "no such folder")
