"""A run's configuration from its file and the overrides of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pgm_scale.config.checks import inconsistencies
from pgm_scale.config.parsing import apply_override, parse, to_mapping
from pgm_scale.config.reading import read_yaml
from pgm_scale.config.sections import RunConfig
from pgm_scale.errors import UserError
from pgm_scale.secrets import secret_problems


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    check: Callable[[RunConfig], list[str]] = lambda _: [],
    complete: Callable[[dict[str, Any]], None] = lambda _: None,
) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides.

    Args:
        check: may add problems of its own.
        complete: may fill in what file and overrides have left out, before anything is checked.

    Raises:
        UserError: the file cannot be read, or one line for each problem in it.
    """
    tree = read_yaml(path)
    problems: list[str] = []
    for override in sorted(overrides, key=lambda text: not text.startswith("model.size=")):
        apply_override(tree, override, problems)
    complete(tree)
    config = parse(RunConfig, tree, problems)
    if config is not None and not problems:
        problems += inconsistencies(config) + check(config) + secret_problems(to_mapping(config))
    if config is None or problems:
        raise UserError(
            f"{path}: {len(problems)} problem(s) in the configuration:\n  " + "\n  ".join(problems)
        )
    return config
