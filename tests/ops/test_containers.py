"""The two images are read, not built: no engine here. What they copy becomes the package that pip installs."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path("ops/containers")
STEPS = ["system", "dependencies", "pgm-scale"]


def dockerfile():
    """(instruction, arguments) of each line, continued ones joined."""
    text = re.sub(r"\\\n\s*", " ", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def definition():
    """Sections of the Apptainer definition by name, as lines; what is before them is its header."""
    sections: dict[str, list[str]] = {}
    name = "header"
    for line in (FOLDER / "pgm-scale.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:]
        elif line and not line.startswith("#"):
            sections.setdefault(name, []).append(line.strip())
    return sections


def copied():
    return [source for word, rest in dockerfile() if word == "COPY" for source in rest.split()[:-1]]


def steps(lines):
    return [found[1] for line in lines if (found := re.match(r"sh ops/containers/install\.sh (\S+)$", line))]


def test_what_is_copied_exists_and_is_let_through():
    rules = [
        line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"
    ]
    assert rules[0] == "*"
    assert all(Path(source).exists() for source in copied())
    assert sorted(rule[1:] for rule in rules if rule.startswith("!")) == sorted(copied())


def test_both_images_hold_the_same_by_the_same_steps():
    files = dict(line.split() for line in definition()["files"])
    assert sorted(files) == sorted(copied())
    assert all(place == f"/opt/build/{source}" for source, place in files.items())
    assert steps(rest for word, rest in dockerfile() if word == "RUN") == STEPS
    assert steps(definition()["post"]) == STEPS
    script = (FOLDER / "install.sh").read_text()
    assert re.findall(r"^  ([a-z-]+)\)$", script, re.MULTILINE) == STEPS
    bases = [rest for word, rest in dockerfile() if word == "ARG"], definition()["arguments"]
    assert bases[0] == bases[1]


def test_versions_are_those_of_the_constraints_alone():
    constraints = re.findall(r"^[^#=\s]+==([^;\s]+)", Path("constraints.txt").read_text(), re.MULTILINE)
    assert len(constraints) > 100
    for name in ("install.sh", "Dockerfile", "pgm-scale.def"):
        text = (FOLDER / name).read_text()
        assert "==" not in text
        assert not [version for version in constraints if version.count(".") > 1 and version in text]
    installs = [line for line in (FOLDER / "install.sh").read_text().splitlines() if " install --no-" in line]
    assert sum("-c constraints.txt" in line for line in installs) == 2


def test_the_image_runs_as_a_user_and_knows_no_secret():
    words = dockerfile()
    assert [rest for word, rest in words if word == "USER"] == ["pgm"]
    assert words[-1] == ("ENTRYPOINT", '["pgm-scale"]')
    settings = " ".join(rest for word, rest in words if word in ("ARG", "ENV"))
    assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD", settings)


def test_an_unknown_step_is_refused():
    done = subprocess.run(
        ["sh", FOLDER / "install.sh", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "dependencies" in done.stderr


@pytest.mark.parametrize("names", [{"pyproject.toml", "constraints.txt", "README.md"}, None], ids=STEPS[1:])
def test_pip_makes_the_package_of_what_is_there(names, tmp_path):
    """First nothing but what it depends on, then all of it."""
    source = tmp_path / "source"
    for name in copied():
        if (names is None or name in names) and not name.startswith("ops/"):
            copy = shutil.copytree if Path(name).is_dir() else shutil.copyfile
            source.mkdir(exist_ok=True)
            copy(name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
    ]
    subprocess.run([*command, source], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        metadata = archive.read(next(name for name in inside if name.endswith("/METADATA"))).decode()
    assert "Requires-Dist: torch>=" in metadata
    for module in ("pgm_scale/cli/__init__.py", "data_prep/cli.py", "launchers/after.py"):
        assert (module in inside) == (names is None)
