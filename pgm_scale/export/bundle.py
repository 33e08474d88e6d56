"""The models' code as loose files, for people who load an exported folder without this package.

transformers' `trust_remote_code` copies the .py files that the model's file names by relative imports, all from
one folder, and imports them as a package. So each module that the Hugging Face classes need, found by walking the
imports, becomes a file of that folder: `pgm_scale.models.blocks` is `pgm_scale_models_blocks.py`, and what imports
it says `from .pgm_scale_models_blocks import ...`. There is one definition of each architecture; this only renames
modules.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pgm_scale

PACKAGE = "pgm_scale"
ENTRY = "pgm_scale.export.hugging_face"
ENTRY_NAME = "modeling_pgm_scale"
_HEADER = (
    f"# From pgm-scale {pgm_scale.__version__} (MIT license), module {{module}}, by `pgm-scale export`.\n"
)


def bundled_files(entry: str = ENTRY, entry_name: str = ENTRY_NAME) -> dict[str, str]:
    """File names and contents; the entry's file is `entry_name`.py."""
    names = {module: module.replace(".", "_") for module in _closure(entry)} | {entry: entry_name}
    assert len(set(names.values())) == len(names), "two modules would be one file"
    files = {}
    for module, name in names.items():
        text = _HEADER.format(module=module) + _with_relative_imports(_source(module), names)
        files[f"{name}.py"] = text
    # transformers takes from a local folder only what the first file itself names.
    others = sorted(name for module, name in names.items() if module != entry)
    listed = "".join(f"    from .{name} import __name__ as _\n" for name in others)
    files[f"{entry_name}.py"] += f"\nif False:  # only for transformers, to copy these files too\n{listed}"
    return files


def _closure(entry: str) -> list[str]:
    """The entry and every module of this package that it needs, in alphabetical order."""
    found, todo = set(), [entry]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += [target for node in _own_imports(ast.parse(_source(module))) for target in _targets(node)]
    return sorted(found)


def _own_imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            assert not own, f"write `from ... import`, not `import {own[0]}`"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are for the bundle"
            if node.module is not None and node.module.split(".")[0] == PACKAGE:
                yield node


def _targets(node: ast.ImportFrom) -> Iterator[str]:
    """The modules that one import statement needs: those it names, or the one it takes names from."""
    for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        yield submodule if _path(submodule).is_file() else str(node.module)


def _with_relative_imports(source: str, names: dict[str, str]) -> str:
    """The source, all else of it as it was."""
    lines = source.splitlines(keepends=True)
    for node in sorted(_own_imports(ast.parse(source)), key=lambda node: -node.lineno):
        assert node.end_lineno is not None
        indent = " " * node.col_offset
        statements = []
        for alias, target in zip(node.names, _targets(node), strict=True):
            given = f" as {alias.asname}" if alias.asname else ""
            if target == node.module:
                statements.append(f"{indent}from .{names[target]} import {alias.name}{given}\n")
            else:
                statements.append(f"{indent}from . import {names[target]} as {alias.asname or alias.name}\n")
        lines[node.lineno - 1 : node.end_lineno] = statements
    return "".join(lines)


def _source(module: str) -> str:
    return _path(module).read_text(encoding="utf-8")


def _path(module: str) -> Path:
    """The file of a module or of a package's `__init__`."""
    path = Path(pgm_scale.__file__).parent.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
