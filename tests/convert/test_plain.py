"""OmegaConf's state and a fast tokenizer's, as omegaconf and transformers pickle them."""

from __future__ import annotations

import io
import pickle
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING, OmegaConf

from pgm_scale.convert import restricted_pickle
from pgm_scale.convert.plain import plain, tokenizer_json
from pgm_scale.convert.restricted_pickle import Record
from pgm_scale.errors import UserError
from tests.convert import published


class Shape(Enum):
    ROUND = 1


@dataclass
class Typed:
    width: int = 3
    names: list[str] = field(default_factory=lambda: ["a"])
    missing: str = MISSING
    shape: Shape = Shape.ROUND


def read(value: Any, protocol: int) -> Any:
    return restricted_pickle.load(io.BytesIO(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_omegaconf_is_as_its_own_container(protocol: int) -> None:
    tree = {
        "model": {"n_heads": 12, "length": "${seq}", "none": None, "big": 2**70, "ratio": 0.5, "on": True},
        "seq": 12,
        "list": [1, [2.5, "a"], {"x": b"y"}, "${seq}"],
        "missing": "???",
        3: {"number": "key"},
        "all": "${model}",
    }
    config = OmegaConf.create(tree)
    assert plain(read(config, protocol)) == OmegaConf.to_container(config, resolve=False) == tree
    assert plain(read({"config": config.model}, protocol)) == {"config": tree["model"]}, (
        "a part, with its parent"
    )


def test_typed_omegaconf() -> None:
    found = plain(read(OmegaConf.structured(Typed), 2))
    assert (found["width"], found["names"], found["missing"]) == (3, ["a"], "???")
    assert isinstance(found["shape"], str)


def test_other_classes() -> None:
    found = plain(read({"args": Namespace(lr=[1e-4]), "path": Path("a"), "set": {1}, "kind": Path}, 2))
    assert found["args"] == {"lr": [1e-4]}
    assert found["set"] == [1]
    assert found["kind"].startswith("pathlib")


def test_nothing_is_imported() -> None:
    data = pickle.dumps({"config": published.hydra_config(), "tokenizer": published.fast_tokenizer()}, 2)
    foreign = ("omegaconf", "transformers")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in foreign}
    for name in before:
        sys.modules[name] = None  # type: ignore[assignment]  # which makes an import fail
    try:
        value = restricted_pickle.load(io.BytesIO(data))
        assert plain(value)["config"]["model"]["n_heads"] == 2
        assert tokenizer_json(value["tokenizer"])
    finally:
        sys.modules.update(before)


def test_values_that_hold_themselves_or_grow() -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(UserError, match="nested"):
        plain(ring)
    doubled: Any = 0
    for _ in range(40):
        doubled = [doubled, doubled]
    with pytest.raises(UserError, match="too many"):
        plain(doubled)
    made = Record("collections", "Counter", ())
    made.items = [*[("a", 1)] * 10_000, None]
    with pytest.raises(UserError, match="too many"):
        plain([made] * 100)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_the_json_of_a_tokenizer(protocol: int) -> None:
    tokenizer = published.fast_tokenizer()
    found = tokenizer_json(read(tokenizer, protocol))
    assert found is not None
    assert found.decode() == tokenizer.backend_tokenizer.to_str()
    others: list[Any] = [None, {}, "text", read(Namespace(_tokenizer=b"{}"), protocol)]
    assert [tokenizer_json(other) for other in others] == [None] * 4
