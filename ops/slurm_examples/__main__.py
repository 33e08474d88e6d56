"""Write the sbatch text of every example beside this file, each as its launch would submit it."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

from launchers.command import build_stage
from launchers.submission import sbatch_text
from ops.slurm_examples import EXAMPLES, FOLDER, PYTHON, ROOT, RUNS, Example
from pgm_scale.config import read_yaml
from pgm_scale.files import atomic_write_bytes


def texts() -> Iterator[tuple[Path, str]]:
    """Every file of this folder and what belongs into it.

    Raises:
        UserError: a layout does not divide its nodes, or a configuration is wrong.
    """
    for example in EXAMPLES:
        yield FOLDER / f"{example.name}.sh", _text(example)


def _text(example: Example) -> str:
    folder = f"{RUNS}/{example.name}"
    cluster = f"configs/clusters/{example.cluster}.yaml"
    words = (example.config, f"folder={folder}", *example.overrides)
    interpreter = read_yaml(ROOT / cluster)["slurm"].get("python", PYTHON)
    stage = build_stage(
        example.command, words, cluster, {"nodes": example.nodes, "python": interpreter}, example.name
    )
    launch = ["pgm-scale launch", example.command, *words, "--cluster", cluster, f"--nodes {example.nodes}"]
    told = " ".join([*launch, f"--name {example.name}"])
    shebang, rest = sbatch_text(stage).split("\n", 1)
    return "\n".join([shebang, *_wrapped(told), *_wrapped(_NOTE), rest])


_NOTE = (
    "submits this, and with --dry-run prints it; without slurm.python, the interpreter is the one that launches. "
    "Written by `python -m ops.slurm_examples`. The command itself is in the pickle that launch writes into the "
    "run folder: to use the text alone, put `-m pgm_scale.cli train CONFIG ...` in the place of "
    "`-u -m submitit.core._submit FOLDER`."
)


def _wrapped(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)]


def main() -> None:
    argparse.ArgumentParser(prog="python -m ops.slurm_examples", description=__doc__).parse_args()
    os.chdir(ROOT)  # configurations are named from there
    for path, text in texts():
        atomic_write_bytes(path, text.encode())
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
