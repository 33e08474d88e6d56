"""The model card stays Markdown whatever it is told, and tells neither places nor accounts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.export.card import CardFacts, model_card
from pgm_scale.run_folder import load_run
from tests.export.runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("r"), "ar")


def card(run: Path, name: str = "name", source: dict[str, Any] | None = None, **facts: Any) -> str:
    data = DatasetManifest.load(run.parent / "data" / "train")
    values: dict[str, Any] = {
        "parameters": 5,
        "dtype": "fp32",
        "settings": {},
        "metrics": {},
        "evaluation": {},
    } | facts
    told = CardFacts(data=dataclasses.replace(data, source=source or {}), **values)
    return model_card(name, load_run(run).description, told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/data/someone/corpus", "corpus"),
        ("C:\\Users\\someone\\corpus", "corpus"),
        ("s3://key:password@bucket/corpus?token=password", "corpus"),
        ("https://someone:password@host", "a path"),
        ("https://host/a/b/#password", "b"),
        ("/", "a path"),
        ("train:bpe:1024", "train:bpe:1024"),
    ],
)
def test_places_are_left_out(run: Path, text: str, told: str) -> None:
    written = card(run, source={"input": {"path": text, "more": [text]}}, evaluation={"split": text})
    assert f"| source.input.path | {told} |" in written
    assert f"| source.input.more | {told} |" in written
    assert f"| split | {told} |" in written
    assert "someone" not in written
    assert "password" not in written


def test_hostile_text_stays_in_its_cell(run: Path) -> None:
    written = card(run, name="---\n# |x|", evaluation={"a|b\n## Heading": "one\n\n## two | three"})
    _, front, body = written.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-generation"  # it is an autoregressive one
    assert [line for line in body.splitlines() if line.startswith("## ")] == [
        "## Model",
        "## Data",
        "## Evaluation",
        "## Use",
    ]
    assert "| a\\|b ## Heading | one ## two \\| three |" in body.splitlines()


def test_numbers_are_told_as_they_are(run: Path) -> None:
    metrics = {
        "loss": 1 / 3,
        "step": 10**12,
        "nothing": None,
        "list": [1.0, 2.5],
        "nan": float("nan"),
        "on": True,
    }
    lines = card(run, metrics=metrics).splitlines()
    for line in (
        "| loss | 0.333333 |",
        "| step | 1000000000000 |",
        "| list | 1, 2.5 |",
        "| nan | nan |",
        "| on | true |",
    ):
        assert line in lines
    assert not any("nothing" in line for line in lines)
