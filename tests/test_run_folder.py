"""What a run folder of an image model keeps, and what it refuses to go on with."""

import dataclasses
import json
from pathlib import Path

import pytest

from pgm_scale.data.manifest import DatasetManifest, ImageContent
from pgm_scale.errors import UserError
from pgm_scale.run_folder import RunFolder, RunIdentity, check_fits_run
from tests.tiny_data import tiny_config, write_tiny_data


def image_manifest(text: DatasetManifest, class_names: tuple[str, ...] = ("a", "b")) -> DatasetManifest:
    """As if the text were the codes of images."""
    return dataclasses.replace(text, images=ImageContent("codes", 32, 3, 4, class_names))


def test_a_run_on_codes_keeps_the_vq_tokenizer(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    text = DatasetManifest.load(data / "train")
    (data / "train" / "vq.safetensors").write_bytes(b"weights")
    config = tiny_config(data, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    tokenizer = data / "train" / "tokenizer.json"
    identity = run.create_or_match(config, image_manifest(text), tokenizer)
    assert (run.path / "vq.safetensors").read_bytes() == b"weights"
    assert run.identity() == identity
    assert identity.images == ImageContent("codes", 32, 3, 4, ("a", "b"))
    assert run.create_or_match(config, image_manifest(text), tokenizer) == identity
    with pytest.raises(UserError, match=r"data\.train: images\.class_names: class 1 is 'b' != 'c'"):
        run.create_or_match(config, image_manifest(text, ("a", "c")), tokenizer)
    with pytest.raises(UserError, match="content: images != text"):
        check_fits_run(text, identity, "the split")


def test_a_run_of_before_the_images_is_still_one(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    text = DatasetManifest.load(data / "train")
    run = RunFolder(tmp_path)
    tree = dataclasses.asdict(RunIdentity.new(text))
    assert tree.pop("images") is None
    run.identity_path.write_text(json.dumps(tree))
    assert run.identity() == dataclasses.replace(RunIdentity.new(text), run_id=tree["run_id"])
    assert not (run.path / "vq.safetensors").exists()
