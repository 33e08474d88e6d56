"""The loose files import nothing but each other and what comes with transformers, and all resolve."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

from pgm_scale.export import bundle
from pgm_scale.export.bundle import ENTRY_NAME, bundled_files

# transformers itself requires numpy and pyyaml.
ALLOWED = {"torch", "transformers", "safetensors", "numpy", "yaml"} | set(sys.stdlib_module_names)


def test_files_import_each_other_and_little_else() -> None:
    files = bundled_files()
    assert f"{ENTRY_NAME}.py" in files
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, name
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in ALLOWED, (name, node.module)
            if isinstance(node, ast.ImportFrom) and node.level:
                targets = [node.module] if node.module else [alias.name for alias in node.names]
                assert {f"{target}.py" for target in targets} <= files.keys(), (name, targets)


def test_the_first_file_names_all_as_transformers_reads_it(tmp_path: Path) -> None:
    """From a local folder it copies only what it finds here."""
    files = bundled_files()
    first = tmp_path / f"{ENTRY_NAME}.py"
    first.write_text(files[first.name])
    assert {f"{name}.py" for name in get_relative_imports(first)} == files.keys() - {first.name}


def test_it_is_small_and_has_no_training() -> None:
    names = set(bundled_files())
    banned = (
        "parallel",
        "training",
        "checkpoint_",
        "objectives_",
        "convert",
        "serve",
        "planning",
        "run_folder",
    )
    assert not [name for name in names for word in banned if f"pgm_scale_{word}" in name]
    assert len(names) < 80


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Imports of every form; `top.used` is a package."""
    sources = {
        "__init__.py": "VERSION = 1\n",
        "entry.py": (
            "from __future__ import annotations\n"
            "from pgm_scale import used, other as different\n"
            "from pgm_scale.used import (\n    value,  # a comment\n    deep as down,\n)\n"
            "from pgm_scale import VERSION\n"
            "def late():\n    from pgm_scale.late import answer\n\n    return answer\n"
            "RESULT = (used.value, different.name, value, down.name, late(), VERSION)\n"
        ),
        "used/__init__.py": "from pgm_scale.used.deep import name\nvalue = 'value of ' + name\n",
        "used/deep.py": "name = 'deep'\n",
        "other.py": "name = 'other'\n",
        "late.py": "answer = 42\n",
        "unused.py": "raise SystemExit\n",
    }
    for name, text in sources.items():
        path = tmp_path / "pgm_scale" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(bundle.pgm_scale, "__file__", str(tmp_path / "pgm_scale" / "__init__.py"))
    return tmp_path


def test_every_form_of_import_is_renamed(package: Path, tmp_path: Path) -> None:
    files = bundled_files("pgm_scale.entry", "first")
    assert not any("unused" in name for name in files)
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, text in files.items():
        (flat / name).write_text(text)
    code = "import first_package.first as f; print(f.RESULT)"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "first_package").symlink_to(flat)
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path / "site",
        timeout=60,
    )
    assert ran.stdout == "('value of deep', 'other', 'value of deep', 'deep', 42, 1)\n"


def test_an_import_that_cannot_be_renamed_is_a_bug(package: Path) -> None:
    (package / "pgm_scale" / "late.py").write_text("import pgm_scale.other\nanswer = 42\n")
    with pytest.raises(AssertionError, match=r"write `from ... import`, not `import pgm_scale.other`"):
        bundled_files("pgm_scale.entry", "first")
