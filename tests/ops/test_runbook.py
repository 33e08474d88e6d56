"""Every command of the runbook is real: it parses, and what it launches is what the launcher would submit."""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from launchers.cli import build_parser as launch_parser
from launchers.command import LAUNCHABLE
from pgm_scale import config as configuration
from pgm_scale.cli import main, parse_arguments

ROOT = Path.cwd()
TEXT = Path("ops/runbook.md").read_text()


def commands(text):
    """The words behind each `pgm-scale`, of code fences (lines joined, comments cut) and of code within lines."""
    fences = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(fences).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = [shlex.split(line, comments=True) for line in (*lines, *spans) if line.startswith("pgm-scale ")]
    return [tuple(words[1:]) for words in found]


COMMANDS = commands(TEXT)
LAUNCHES = [words for words in COMMANDS if words[:1] == ("launch",) and words[1] in LAUNCHABLE]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with what the runbook's commands read."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    report = tmp_path / "jobs/preflight/preflight.json"
    report.parent.mkdir(parents=True)
    report.write_text('{"bad_nodes": ["node003"]}')
    monkeypatch.chdir(tmp_path)


def test_commands_are_found():
    text = "a `pgm-scale runs` b\n```\n# pgm-scale no\npgm-scale train x \\\n  y=1 # z\nls pgm-scale\n```\n"
    assert commands(text) == [("train", "x", "y=1"), ("runs",)]
    assert len(COMMANDS) > 30
    assert {"train", "launch", "runs", "doctor", "plan", "report", "export"} <= {
        words[0] for words in COMMANDS
    }


@pytest.mark.parametrize("words", [w for w in COMMANDS if w not in LAUNCHES], ids=" ".join)
def test_a_command_parses(words, checkout):
    options = parse_arguments(words)
    if words[0] == "launch":  # status, logs, cancel
        launch_parser().parse_args(words[1:])
    if words[0] in ("train", "config", "plan", "doctor"):
        configuration.load(options.config, options.overrides)


@pytest.mark.parametrize("words", LAUNCHES, ids=" ".join)
def test_a_launch_would_be_submitted(words, checkout):
    words = [word for word in words if word not in ("--local", "--dry-run")]
    position = words.index("--then") if "--then" in words else len(words)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words[:position], "--dry-run", *words[position:]])
    assert code == 0, err.getvalue()
    text = out.getvalue()
    assert text.count("#!/bin/bash") == 1 + words.count("--then")
    assert ("#SBATCH --exclude=node003" in text) == ("jobs/preflight/preflight.json" in words)


def test_files_it_names_are_there():
    spans = re.findall(r"`((?:ops|configs|launchers|pgm_scale)/[^`\s{}]*)`", TEXT)
    assert len(spans) > 5
    assert [name for name in spans if not (ROOT / name).exists()] == []
    clusters = re.findall(r"^\| `([a-z0-9-]+\.yaml)`", TEXT, re.MULTILINE)
    assert sorted(clusters) == sorted(os.listdir(ROOT / "configs/clusters"))


def test_keys_it_names_are_keys():
    """`section.key` of a run's configuration, and `slurm.key` of a cluster file."""
    from launchers.cluster import SlurmJob

    tree = configuration.to_mapping(configuration.load("configs/owt_sdtt.yaml", ["model.size=pgm-8-8-768"]))
    slurm = {*SlurmJob.__dataclass_fields__, "jobs"}
    tree["model"]["size"] = None  # stands for others
    named = re.findall(r"\b(\w+)\.(\w+)(?:\.\w+)?(?==|`)", TEXT)
    sections = [(section, key) for section, key in named if section in tree or section == "slurm"]
    assert len(sections) > 15
    assert [f"{s}.{k}" for s, k in sections if k not in (slurm if s == "slurm" else tree[s])] == []
