"""The configuration: round trip, every unknown key and wrong type found, named sizes, shipped files."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgm_scale import config as configuration
from pgm_scale.config import MODEL_SIZES, RunConfig, checks
from pgm_scale.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def _leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def _parse(tree: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    problems: list[str] = []
    return configuration.parse(RunConfig, tree, problems), problems


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_load_and_print_what_loads_again(path: Path, tmp_path: Path) -> None:
    config = configuration.load(path)
    again = tmp_path / "again.yaml"
    again.write_text(configuration.to_yaml(config))
    assert configuration.load(again) == config


@pytest.mark.fault(60)
def test_every_misspelt_key_is_found_and_the_right_one_named() -> None:
    tree = configuration.to_mapping(configuration.load(CONFIGS[0]))
    for path in _leaves(tree):
        mutated = copy.deepcopy(tree)
        section = mutated
        for key in path[:-1]:
            section = section[key]
        section[path[-1] + "x"] = section.pop(path[-1])
        _, problems = _parse(mutated)
        unknown = [line for line in problems if line.startswith(".".join(path) + "x: unknown key")]
        assert len(unknown) == 1, (path, problems)
        assert repr(path[-1]) in unknown[0]


@pytest.mark.fault(60)
def test_every_wrong_type_is_found() -> None:
    tree = configuration.to_mapping(configuration.load(CONFIGS[0]))
    for path in _leaves(tree):
        mutated = copy.deepcopy(tree)
        section = mutated
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = {"a": 1}
        _, problems = _parse(mutated)
        assert any(line.startswith(".".join(path)) for line in problems), path


def _lists(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}


def test_a_size_stands_for_its_keys_and_keys_beside_it_win(tmp_path: Path) -> None:
    for size, keys in MODEL_SIZES.items():
        beside: dict[str, Any] = {"codebook_size": 64} if keys["kind"] == "vq" else {"dropout": 0.5}
        config, problems = _parse(
            {"folder": "x", "data": {"train": "a", "validation": "b"}, "model": {"size": size, **beside}}
        )
        assert not problems
        assert config is not None
        found = configuration.to_mapping(config.model)
        assert found == found | _lists(keys) | beside
    _, problems = _parse(
        {"folder": "x", "data": {"train": "a", "validation": "b"}, "model": {"size": "pgm-88"}}
    )
    assert "did you mean 'pgm-8-8-768'" in problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping"),
        ("- 1", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("folder: x", "data: required, but missing"),
        ("folder: x\ndata: 3", "data: expected a mapping"),
        ("folder: x\ndata: {train: a, validation: b}\nmodel: 3", "model: expected a mapping"),
        ("folder: x\ndata: {train: a, validation: b}\noptimizer: {betas: [1]}", "expected 2 values"),
        ("folder: x\ndata: {train: a, validation: b}\nobjective: {kind: pgn}", "did you mean 'pgm'"),
    ],
)
@pytest.mark.fault(61)
def test_odd_files_are_one_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        configuration.load(path)


def test_a_size_on_the_command_line_wins_over_the_keys_of_the_file() -> None:
    demo = next(path for path in CONFIGS if path.name == "demo.yaml")
    model = configuration.load(
        demo, ["model.dropout=0.3", "model.hidden_size=64", "model.size=pgm-6-6-1024"]
    ).model
    assert configuration.to_mapping(model) == configuration.to_mapping(model) | MODEL_SIZES[
        "pgm-6-6-1024"
    ] | {
        "hidden_size": 64,
        "dropout": 0.3,
    }


@pytest.mark.parametrize(
    "override",
    [
        "novalue",
        "=3",
        "folder.deeper=1",
        "training.steps=x",
        "training.steps=0",
        "training.steps=2020-99-99",
        "training.seed=-1",
        "optimizer.betas=[2, 3]",
        "optimizer.learning_rate=nan",
        "optimizer.epsilon=-1",
        "model.condition_size=0",
        "model.num_encoder_blocks=-1",
        "objective.minimum_time=2",
        "validation.samples=-1",
        "sampler.top_p=7",
        "sampler.temperature=-1",
        "training.micro_batch_sequences=7",
        "model=3",
    ],
)
@pytest.mark.fault(60)
def test_odd_overrides_are_one_message(override: str) -> None:
    with pytest.raises(UserError):
        configuration.load(next(path for path in CONFIGS if path.name == "demo.yaml"), [override])


def test_every_number_has_a_range() -> None:
    """A new number without one would let nonsense train."""
    numbers = set()
    for path in CONFIGS:
        tree = configuration.to_mapping(configuration.load(path))
        for section, values in tree.items():
            if isinstance(values, dict):
                numbers |= {
                    f"{section}.{key}"
                    for key, value in values.items()
                    if isinstance(value, (int, float)) and not isinstance(value, bool)
                }
    assert numbers - {"parallel.zero_stage"} <= checks._RANGES.keys()


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    config = configuration.load(CONFIGS[0], ["optimizer.learning_rate=1e-3"])
    assert config.optimizer.learning_rate == 1e-3
    assert yaml.safe_load("1e-3") == "1e-3"  # why it needs care
