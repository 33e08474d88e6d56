"""Plain containers to typed sections and back; every fault is a line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml

from pgm_scale.config.reading import parse_yaml
from pgm_scale.config.sections import RunConfig
from pgm_scale.config.sizes import MODEL_SIZES

_LONGEST_KEY, _LONGEST_VALUE = 100, 200  # letters of a message; an anchor of anchors would be gigabytes
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, _LONGEST_VALUE, _LONGEST_VALUE


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain containers, as written to YAML; `parse` of the result gives the same config back."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    } | {
        f.name: to_mapping(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, f.name))
    }


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


_type_hints = functools.cache(typing.get_type_hints)


def parse(cls: type, tree: Any, problems: list[str], where: str = "") -> Any:
    """Build the dataclass `cls` from plain containers, adding a line to `problems` for each fault."""
    if not isinstance(tree, Mapping):
        problems.append(f"{where or 'top level'}: expected a mapping, found {_SHORT.repr(tree)}")
        return None
    hints = _type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    for key in tree:
        if key not in known:
            problems.append(f"{_join(where, key)}: unknown key{_nearest(_cut(key), known)}")
    values = {}
    for name, spec in known.items():
        if name in tree:
            values[name] = _parse_value(hints[name], tree[name], problems, _join(where, name))
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(where, name)}: required, but missing")
    return cls(**values) if len(problems) == before else None


def _parse_value(hint: Any, value: Any, problems: list[str], where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        members = [a for a in arguments if a is not type(None)]
        if len(members) > 1 and all(dataclasses.is_dataclass(member) for member in members):
            return _parse_kind(members, value, problems, where)
        return _parse_value(members[0], value, problems, where)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, problems, where)
    if origin is dict:
        return _parse_mapping(arguments, value, problems, where)
    if origin is Literal:
        if value in arguments and any(type(value) is type(a) for a in arguments):
            return value
        choices = ", ".join(str(a) for a in arguments)
        problems.append(
            f"{where}: {_SHORT.repr(value)} is not one of {choices}{_nearest(_cut(value), map(str, arguments))}"
        )
        return None
    if origin is tuple:
        if arguments[-1] is Ellipsis and isinstance(value, (list, tuple)):
            arguments = arguments[:1] * len(value)
        if isinstance(value, (list, tuple)) and len(value) == len(arguments):
            return tuple(
                _parse_value(a, v, problems, f"{where}[{i}]")
                for i, (a, v) in enumerate(zip(arguments, value, strict=True))
            )
        count = "a list of" if Ellipsis in arguments else len(arguments)
        problems.append(f"{where}: expected {count} values, found {_SHORT.repr(value)}")
        return None
    return _parse_scalar(hint, value, problems, where)


def _parse_mapping(hints: tuple[Any, ...], value: Any, problems: list[str], where: str) -> Any:
    """A mapping of free keys; a scalar stands for a string, as in `NCCL_NVLS_ENABLE: 0`."""
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a mapping, found {_SHORT.repr(value)}")
        return None
    scalars = hints[1] is str
    return {
        str(key): str(item)
        if scalars and isinstance(item, (int, float)) and not isinstance(item, bool)
        else _parse_value(hints[1], item, problems, _join(where, key))
        for key, item in value.items()
    }


def _parse_kind(members: list[Any], value: Any, problems: list[str], where: str) -> Any:
    """Choose the union's member by `kind`; `size` stands for the keys of a named model."""
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a mapping, found {_SHORT.repr(value)}")
        return None
    tree = dict(value)
    size = tree.pop("size", None) if where == "model" else None
    if size is not None:
        if not isinstance(size, str) or size not in MODEL_SIZES:
            problems.append(
                f"{where}.size: unknown size {_SHORT.repr(size)}{_nearest(_cut(size), MODEL_SIZES)}"
            )
            return None
        tree = MODEL_SIZES[size] | tree
    by_kind = {typing.get_args(typing.get_type_hints(m)["kind"])[0]: m for m in members}
    kind = tree.get("kind", next(iter(by_kind)))
    if not isinstance(kind, str) or kind not in by_kind:
        problems.append(
            f"{where}.kind: {_SHORT.repr(kind)} is not one of {', '.join(by_kind)}{_nearest(_cut(kind), by_kind)}"
        )
        return None
    return parse(by_kind[kind], tree, problems, where)


def _parse_scalar(hint: Any, value: Any, problems: list[str], where: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except (ValueError, OverflowError):
            pass
    elif hint is str and isinstance(value, str):
        if _is_text(value):
            return value
        problems.append(f"{where}: {_SHORT.repr(value)} is not text that a file can hold; write it again")
        return None
    elif type(value) is hint:
        return value
    problems.append(f"{where}: expected {hint.__name__}, found {_SHORT.repr(value)}")
    return None


def _is_text(value: str) -> bool:
    """No name of a file, and of no use elsewhere: a NUL, and half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        problems.append(f"override {override!r}: expected section.key=value")
        return
    *sections, key = path.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            problems.append(f"override {override!r}: {section} is a value, not a section")
            return
        tree = child
    try:
        tree[key] = parse_yaml(text)
    except ValueError:
        tree[key] = text
    if (sections, key) == (["model"], "size"):
        # It must win over the keys that the file gives; overrides of these come after it.
        for named in MODEL_SIZES.get(str(tree[key]), {}):
            tree.pop(named, None)


def _join(where: str, key: Any) -> str:
    return f"{where}.{_cut(key)}" if where else _cut(key)


def _cut(key: Any) -> str:
    text = str(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}..."


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
