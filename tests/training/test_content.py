"""A run on data that its model or objective is not made for is refused in one line that says what to set."""

import dataclasses
from pathlib import Path

import pytest

from pgm_scale.config import (
    MaskGITObjectiveConfig,
    MaskGITTransformerConfig,
    RunConfig,
    VQModelConfig,
    VQObjectiveConfig,
)
from pgm_scale.data.manifest import DatasetManifest, ImageContent
from pgm_scale.errors import UserError
from pgm_scale.parallel.launch import Launch, find_launch
from pgm_scale.training.content import content_problems
from pgm_scale.training.loop import train
from pgm_scale.training.signals import StopFlag
from tests.tiny_data import tiny_config, write_tiny_data

CODES = ImageContent("codes", 32, 3, 4, tuple("abcdefghij"))
PIXELS = ImageContent("pixels", 12, 1, 12, ("a",))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, DatasetManifest]:
    data = write_tiny_data(tmp_path_factory.mktemp("content") / "data")
    return tiny_config(data, data.parent / "run"), DatasetManifest.load(data / "train")


def test_each_objective_needs_its_content(text: tuple[RunConfig, DatasetManifest]) -> None:
    config, manifest = text
    codes, pixels = (dataclasses.replace(manifest, images=images) for images in (CODES, PIXELS))
    maskgit = dataclasses.replace(config, objective=MaskGITObjectiveConfig())
    vq = dataclasses.replace(config, objective=VQObjectiveConfig())
    assert content_problems(config, manifest) == []
    for wrong, data, line in [
        (config, codes, "objective.kind pgm needs text, but data.train has codes"),
        (maskgit, manifest, "objective.kind maskgit needs codes, but data.train has text"),
        (maskgit, pixels, "objective.kind maskgit needs codes, but data.train has pixels"),
        (vq, codes, "objective.kind vq needs pixels, but data.train has codes"),
    ]:
        (problem,) = content_problems(wrong, data)
        assert problem.startswith(line)


def test_a_model_needs_the_classes_and_the_images_of_the_data(
    text: tuple[RunConfig, DatasetManifest],
) -> None:
    config, manifest = text
    codes, pixels = (dataclasses.replace(manifest, images=images) for images in (CODES, PIXELS))
    maskgit = dataclasses.replace(
        config, objective=MaskGITObjectiveConfig(), model=MaskGITTransformerConfig(num_classes=1000)
    )
    assert content_problems(maskgit, codes) == [
        "model.num_classes 1000, but data.train has 10 classes; set model.num_classes=10"
    ]
    ten = dataclasses.replace(maskgit, model=MaskGITTransformerConfig(num_classes=10))
    assert content_problems(ten, codes) == []
    vq = dataclasses.replace(config, objective=VQObjectiveConfig(), model=VQModelConfig(image_channels=3))
    channels, levels = content_problems(vq, pixels)
    assert channels.endswith("set model.image_channels=1")
    assert "4 levels need sides divisible by 8, but the images of data.train have 12" in levels
    gray = VQModelConfig(image_channels=1, channel_multipliers=(1, 2, 2))
    assert content_problems(dataclasses.replace(vq, model=gray), pixels) == []


def test_it_is_told_before_a_run_starts(text: tuple[RunConfig, DatasetManifest]) -> None:
    config, _ = text
    launch: Launch = find_launch()
    wrong = dataclasses.replace(config, objective=MaskGITObjectiveConfig())
    with pytest.raises(UserError, match=r"cannot train:\n.*maskgit needs codes, but data\.train has text"):
        train(wrong, launch, StopFlag())
    assert not Path(config.folder).exists()
