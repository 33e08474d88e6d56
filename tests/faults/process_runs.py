"""Real processes of `pgm-scale train` on the tiny data, to do things to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pgm_scale import config as configuration
from pgm_scale.parallel.launch import free_port
from tests.tiny_data import tiny_config

COMMAND = [sys.executable, "-m", "pgm_scale.cli"]
PATIENCE_S = 200.0  # a loaded machine is slow
ENDLESS = {"training": {"steps": 100_000}, "checkpoint": {"interval_steps": 100_000}}


def config_file(data: Path, run: Path, **changes: Any) -> str:
    """A configuration beside the run folder; its validations are short."""
    changes["validation"] = {"interval_steps": 1000, "sequences": 8, "samples": 0} | changes.get(
        "validation", {}
    )
    path = run.with_suffix(".yaml")
    path.write_text(configuration.to_yaml(tiny_config(data, run, **changes)))
    return str(path)


def start(words: Sequence[str], variables: dict[str, str] | None = None, **options: Any) -> subprocess.Popen:
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*COMMAND, *words], env=os.environ | (variables or {}), **settings)


def start_ranks(words: Sequence[Sequence[str]]) -> list[subprocess.Popen]:
    """One rank for each sequence of words, as torchrun or srun would start them."""
    port = str(free_port())
    return [
        start(mine, _place(rank, len(words), port), start_new_session=True) for rank, mine in enumerate(words)
    ]


def _place(rank: int, ranks: int, port: str) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    return {key: str(value) for key, value in place.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def ends(processes: Sequence[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes, and what each has said on stderr."""
    try:
        said = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Wait while these processes live."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def wait_for_step(run: Path, step: int, *processes: subprocess.Popen) -> None:
    until(lambda: len(steps(run)) >= step, *processes)


def steps(run: Path) -> list[int]:
    return [record["step"] for record in records(run)]


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def saved(run: Path) -> list[int]:
    """The committed steps."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
