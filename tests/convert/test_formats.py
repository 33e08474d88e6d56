"""The key tables of full-size models, against names and counts that are published."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pgm_scale import config as configuration
from pgm_scale.cli import convert
from pgm_scale.config import MODEL_SIZES, RunConfig
from pgm_scale.convert.formats import FORMATS, llamagen_vq
from pgm_scale.convert.formats.base import DerivedKey
from pgm_scale.models import build_model
from tests.convert import published

GPT2, CODES = 50_258, 16_386
MDLM_SMALL = (published.mdlm_parameters, (GPT2, 768, 128, 12), 130, 169_627_218)
# Format and size of ours; names and shapes of FACTS; how many tensors and parameters FACTS 1.8 and 9 count.
CASES: dict[str, tuple[str, str, Any, tuple[int, ...], int, int]] = {
    "8/8": ("pgm-text", "pgm-8-8-768", published.pgm_parameters, (GPT2, 768, 128, 8, 8), 195, 202_708_818),
    "6/6": ("pgm-text", "pgm-6-6-768", published.pgm_parameters, (GPT2, 768, 128, 6, 6), 151, 171_996_498),
    "1024": ("pgm-text", "pgm-6-6-1024", published.pgm_parameters, (GPT2, 1024, 128, 6, 6), 151, 268_092_754),
    "mdlm": ("mdlm", "mdlm-12-768", *MDLM_SMALL),
    "mdlm-hf": ("mdlm-hf", "mdlm-12-768", *MDLM_SMALL),
    "sdtt md": ("sdtt", "mdlm-24-1024", published.mdlm_parameters, (GPT2, 1024, 128, 24), 250, 424_477_010),
    "ar": ("ar", "ar-12-768", published.ar_parameters, (GPT2, 768, 12), 100, 162_246_482),
    "image 12/12": (
        *("pgm-image", "image-pgm-12-12", published.image_pgm_parameters),
        *((CODES, 1024, 12, 12, 1000), 281, 494_220_290),
    ),
    "image 14/10": (
        *("pgm-image", "image-pgm-14-10", published.image_pgm_parameters),
        *((CODES, 1024, 14, 10, 1000), 277, 494_218_242),
    ),
    "maskgit large": (
        *("maskgit", "maskgit-large", published.maskgit_parameters),
        *((CODES - 1, 1024, 24, 2816, 1024, 1000), 273, 480_443_393),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_full_size_tables_have_the_published_keys_and_counts(case: str) -> None:
    name, size, parameters, sizes, tensors, count = CASES[case]
    problems: list[str] = []
    tree = {"folder": "", "data": {"train": "", "validation": ""}, "model": {"size": size}}
    config = configuration.parse(RunConfig, tree, problems)
    assert not problems
    assert size in MODEL_SIZES
    with torch.device("meta"):
        model = build_model(config.model, CODES if name in ("maskgit", "pgm-image") else GPT2, 1025)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    table, prefix = FORMATS[name].published_keys(list(shapes)), FORMATS[name].prefix
    expected = dict(parameters(*sizes))
    assert len(expected) == tensors
    assert sum(map(math.prod, expected.values())) == count
    direct = {key: ours for key, ours in table.items() if isinstance(ours, str)}
    assert [(key, shapes[ours]) for key, ours in direct.items()] == [
        (prefix + key, shape) for key, shape in expected.items()
    ]
    derived = [key for key, ours in table.items() if isinstance(ours, DerivedKey)]
    assert derived == [prefix + ("head.weight" if name == "maskgit" else "rotary_emb.inv_freq")]


NO_LENGTHS: tuple[Any, ...] = (True, "12", None, [1], 1.5, 0)
NO_SECTIONS: tuple[Any, ...] = (None, [], {"model": 3})


@pytest.mark.parametrize(
    ("said", "length"),
    [
        ({"config": {"model": {"length": 128}}}, 128),
        ({"config": {"backbone": {"model_length": 256}}}, 256),
        ({"model_length": 512}, 512),
        ({"config": {"model": {"length": "${seq}"}, "length": 64}}, 64),
        *[({"config": {"model": {"length": other}}}, 1024) for other in NO_LENGTHS],
        *[({"config": other}, 1024) for other in NO_SECTIONS],
        ({}, 1024),
    ],
)
def test_lengths_are_read_where_they_are_numbers(said: dict[str, Any], length: int) -> None:
    shapes = {name: tuple(shape) for name, shape in published.mdlm_parameters()}
    assert FORMATS["mdlm"].describe(shapes, said).length_tokens == length


@pytest.mark.parametrize(("said", "dropout"), [({"dropout": 0.0}, 0.0), ({"dropout": 0}, 0.0), ({}, 0.1)])
@pytest.mark.parametrize("name", ["mdlm", "pgm-text", "ar"])
def test_no_dropout_is_no_dropout(name: str, said: dict[str, Any], dropout: float) -> None:
    parameters: Any = {
        "mdlm": published.mdlm_parameters,
        "pgm-text": published.pgm_parameters,
        "ar": published.ar_parameters,
    }[name]
    shapes = {key: tuple(shape) for key, shape in parameters()}
    model: Any = FORMATS[name].describe(shapes, {"config": {"model": said}}).model
    assert model.dropout == dropout


def test_the_command_offers_all_formats() -> None:
    assert set(convert._FORMATS) == {*FORMATS, llamagen_vq.NAME}
