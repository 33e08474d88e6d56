"""YAML to plain containers, in bounded time and memory: YAML 1.1 without its traps; nothing is said twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pgm_scale.errors import UserError
from pgm_scale.files import read_bounded

_MOST_BYTES = 1 << 18  # read in a few seconds; a configuration has 3,000
_MOST_BITS = 64  # what neither memory nor a file can count
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _without_colons(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """What `pattern` matches, if there is no colon in it."""
    return re.compile(rf"(?![^:]*:)(?:{pattern.pattern})", pattern.flags)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without numbers in base 60: there 24:00:00 would be 86400."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (so the base class declares it)
        first: [(tag, _without_colons(pattern) if tag in _NUMBERS else pattern) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Of keys that are given once; YAML forbids the rest, and PyYAML takes the last."""
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value[:100]!r} is given twice", key.start_mark
                    )
                seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > _MOST_BITS:  # Python would not even print one of many digits
            raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from disk, or a one-line `UserError`."""
    try:
        content = read_bounded(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; give a YAML file") from None
    try:
        tree = parse_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())[:500]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top, found {type(tree).__name__}")
    return tree


def parse_yaml(text: str) -> Any:
    """The value of YAML text.

    Raises:
        ValueError: it is none.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (LookupError, AttributeError, TypeError) as error:  # PyYAML's, of `!!int ""` and the like
        raise ValueError(f"a value does not fit its tag ({error})") from None
