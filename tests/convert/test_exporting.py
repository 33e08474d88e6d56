"""There and back is the same to the bit, and what is written is plain data in the published layout."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import pgm_scale
from pgm_scale.cli import main
from pgm_scale.convert.exporting import WriteRequest, write_published
from pgm_scale.convert.importing import ImportRequest, import_checkpoint
from pgm_scale.errors import UserError
from pgm_scale.run_folder import RunFolder
from tests.convert import published
from tests.export.runs import STEP, write_run


def convert(source: Path, output: Path, *settings: str, **options: Any) -> None:
    import_checkpoint(ImportRequest(str(source), str(output), settings=settings, **options), lambda _: None)


def back(folder: Path, output: Path, format_name: str) -> list[str]:
    lines: list[str] = []
    write_published(WriteRequest(str(folder), str(output), format_name), lines.append)
    return lines


def loaded(path: Path) -> Any:
    """By torch's own reader for plain data, so nothing in it is code."""
    return torch.load(path, weights_only=True)


def configuration(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["description"]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the bit, in the same order."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == torch.float32, name
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("name", ["pgm-text", "mdlm", "ar"])
def test_lightning(tmp_path: Path, name: str) -> None:
    state_of = {"pgm-text": published.pgm_text_state, "mdlm": published.mdlm_state, "ar": published.ar_state}
    state, average = state_of[name](1), state_of[name](2)
    source = published.write_lightning(tmp_path / "source.ckpt", state, average)
    for weights, expected in (("weight", state), ("ema", average)):
        folder, output = tmp_path / weights, tmp_path / f"{weights}.ckpt"
        convert(source, folder, weights=weights)
        lines = back(folder, output, name)
        assert lines[0] == f"parity: read again, all {len(state)} tensors are equal to the bit"
        content = loaded(output)
        assert_same(content["state_dict"], published.prefixed(expected, "backbone."))
        shadow, published_shadow = content["ema"]["shadow_params"], list(expected.items())
        published_shadow = [item for item in published_shadow if item[0] != "rotary_emb.inv_freq"]
        assert len(shadow) == len(published_shadow)
        assert all(
            torch.equal(tensor, item[1]) for tensor, item in zip(shadow, published_shadow, strict=True)
        )
        assert content["global_step"] == 50_000
        model = content["hyper_parameters"]["config"]["model"]
        assert (model["length"], model["n_heads"], model["hidden_size"]) == (12, 2, 128)
        assert {"loops", "optimizer_states", "lr_schedulers", "epoch"} <= set(content)
        convert(output, tmp_path / f"{weights} again")  # what the file does not say would be another model
        first, second = (configuration(tmp_path / name) for name in (weights, f"{weights} again"))
        kept = ("model", "vocabulary", "length_tokens", "objective")
        assert [first[key] for key in kept] == [second[key] for key in kept]


@pytest.mark.parametrize(
    ("name", "state", "setting"),
    [
        ("pgm-image", published.image_pgm_state(), f"length_tokens={published.GRID_CODES + 1}"),
        ("maskgit", published.maskgit_state(), "model.num_heads=3"),
    ],
)
def test_image_files(tmp_path: Path, name: str, state: dict[str, Tensor], setting: str) -> None:
    convert(published.write_image(tmp_path / "source.pth", state), tmp_path / "folder", setting)
    back(tmp_path / "folder", tmp_path / "back.pth", name)
    content = loaded(tmp_path / "back.pth")
    assert_same(content.pop("model_state_dict"), state)
    assert content == {"iter": 500_400, "global_epoch": 0, "optimizer_state_dict": None}


@pytest.mark.parametrize(
    ("name", "config"), [("mdlm-hf", published.MDLM_HF_CONFIG), ("sdtt", published.SDTT_CONFIG)]
)
def test_hugging_face_folders(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    state = published.prefixed(published.mdlm_state(), "backbone.")
    convert(published.write_hugging_face(tmp_path / "source", state, config), tmp_path / "folder")
    back(tmp_path / "folder", tmp_path / "back", name)
    found = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert_same(OrderedDict((key, found[key]) for key in state), state)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    if name == "mdlm-hf":
        published_keys = {key: config[key] for key in config if key not in ("architectures", "auto_map")}
        assert {key: value for key, value in written.items() if key != "pgm_scale"} == published_keys
    else:
        assert all(
            written["model"][key] == config["model"][key]
            for key in ("hidden_size", "n_blocks", "n_heads", "length")
        )
    convert(tmp_path / "back", tmp_path / "again")


def test_llamagen_vq(tmp_path: Path) -> None:
    state = published.vq_state()
    convert(published.save({"model": state}, tmp_path / "vq.pt"), tmp_path / "folder")
    back(tmp_path / "folder", tmp_path / "back.pt", "llamagen-vq")
    content = loaded(tmp_path / "back.pt")
    # A count of what training chose, which nothing reads.
    used = content["model"].pop("quantize.codebook_used")
    assert torch.equal(used, torch.zeros_like(state.pop("quantize.codebook_used")))
    assert_same(content["model"], state)


def test_a_run_has_both_sets_of_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path, "pgm")
    lines = back(run, tmp_path / "run.ckpt", "pgm-text")
    content = loaded(tmp_path / "run.ckpt")
    raw, averaged = (pgm_scale.load(str(run), weights=kind).model for kind in ("weight", "ema"))
    names = dict(raw.named_parameters())
    state = content["state_dict"]
    assert list(state) != list(names)
    for name, parameter in names.items():
        assert torch.equal(state[f"backbone.{name}"], parameter)
    shadow = content["ema"]["shadow_params"]
    assert all(torch.equal(a, b) for a, b in zip(shadow, averaged.parameters(), strict=True))
    assert not torch.equal(shadow[0], state["backbone.vocab_embed.embedding"])
    assert content["ema"]["decay"] == RunFolder(run).config().training.ema_decay
    assert f"step {STEP}" in lines[-1]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    convert(published.write_lightning(tmp_path / "a.ckpt", published.pgm_text_state()), tmp_path / "folder")
    with pytest.raises(UserError, match="mdlm is no format of a partition_transformer; give --to pgm-text"):
        back(tmp_path / "folder", tmp_path / "out.ckpt", "mdlm")
    with pytest.raises(UserError, match="VQ tokenizer"):
        back(tmp_path / "folder", tmp_path / "out.pt", "llamagen-vq")
    with pytest.raises(UserError, match="--out"):
        back(tmp_path / "folder", tmp_path / "none" / "out.ckpt", "pgm-text")
    with pytest.raises(UserError):
        back(tmp_path / "missing", tmp_path / "out.ckpt", "pgm-text")
    with pytest.raises(UserError, match=r"a\.ckpt is there already"):
        back(tmp_path / "folder", tmp_path / "a.ckpt", "pgm-text")
    averaged = published.write_lightning(
        tmp_path / "b.ckpt", published.pgm_text_state(), published.pgm_text_state(2)
    )
    convert(averaged, tmp_path / "averaged")
    request = WriteRequest(str(tmp_path / "averaged"), str(tmp_path / "c.ckpt"), "pgm-text", "weight")
    with pytest.raises(UserError, match="holds averaged weights only"):
        write_published(request)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        back(tmp_path / "folder", tmp_path / "full", "mdlm-hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.ckpt",
        "averaged",
        "b.ckpt",
        "folder",
        "full",
    ]


def test_what_published_files_do_not_say_comes_back(tmp_path: Path) -> None:
    source = published.write_lightning(tmp_path / "a.ckpt", published.mdlm_state(), published.mdlm_state(2))
    settings = ["vocabulary.bos_id=3", "vocabulary.eos_id=4", "sampler.steps=7", "length_tokens=9"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    first, second, written = tmp_path / "first", tmp_path / "second", tmp_path / "b.ckpt"
    assert main(["convert", str(source), "--out", str(first), *arguments]) == 0
    assert main(["convert", str(first), "--to", "mdlm", "--out", str(written)]) == 0
    assert main(["convert", str(written), "--out", str(second)]) == 0
    before, after = (pgm_scale.load(str(folder)).description for folder in (first, second))
    assert (after.vocabulary.bos_id, after.vocabulary.eos_id, after.length_tokens) == (3, 4, 9)
    assert after.sampler == before.sampler
    assert after.objective == before.objective


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published.write_lightning(tmp_path / "a.ckpt", published.mdlm_state(), published.mdlm_state(2))
    folder, output = str(tmp_path / "folder"), tmp_path / "b.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = ["--weights", "weight", "--set", "sampler.steps=7", "--from", "mdlm"]
        assert main(["convert", str(source), "--out", folder, *arguments]) == 0
        assert "parity: largest logit difference 0 " in capsys.readouterr().out
        assert pgm_scale.load(folder).description.sampler.steps == 7
        assert main(["convert", folder, "--to", "mdlm", "--out", str(output)]) == 0
        assert "equal to the bit" in capsys.readouterr().out
    assert_same(loaded(output)["state_dict"], loaded_state(source))
    assert main(["convert", folder, "--to", "mdlm", "--out", str(output), "--no-strict"]) == 2
    assert "leave them out with --to" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none"), "--out", str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def loaded_state(path: Path) -> dict[str, Tensor]:
    """Of a file of the tests' own making, which holds classes."""
    return torch.load(path, weights_only=False)["state_dict"]
