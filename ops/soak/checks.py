"""What has to hold of a run folder whenever a session has ended, however it did, and when the run is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from pgm_scale.checkpoint.fragments import KINDS
from pgm_scale.checkpoint.manifest import find_problems, join, read_manifest
from pgm_scale.checkpoint.step_folders import StepFolders
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.run_folder import RunFolder

Record = dict[str, Any]

# After a change of layout, relative to the uninterrupted run. Rounding adds up from step to step, and Adam makes a
# gradient that is mostly rounding into an update of up to the learning rate; the loss hardly sees those.
BOUNDS = {"loss": 1e-5, "validation_nll": 1e-5, "gradient_norm": 1e-4}
# Norm of the difference over norm, of weights, moments or EMA. One update too many or too few makes 7e-3 with the
# learning rate of the moved runs, a tensor that is lost or summed twice 0.5 and more.
STATE_BOUND = 1e-3
# Of the time or of the machine; everything else that is recorded is a function of the configuration and the data.
_MEASURED = (
    "tokens_per_second",
    "mfu",
    "data_wait_s",
    "checkpoint_s",
    "memory_bytes",
    "unix_time_s",
    "straggl",
)
_OF_THE_DATA = ("step", "samples", "sample_numbers", "data_fingerprint", "learning_rate")


def read_records(run: Path, killed: bool) -> list[Record]:
    """The recorded steps; of a killed session the last line may be cut."""
    path = RunFolder(run).metrics_path
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if killed and lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def committed(run: Path) -> list[int]:
    """Steps that are committed, with one whose manifest is written and whose rename is not done."""
    folders = StepFolders(run)
    steps = folders.steps()
    for saving in folders.folder.glob(".step_*.saving"):
        try:
            steps.append(read_manifest(saving).step)
        except ValueError:
            continue
    return sorted(set(steps))


def checkpoint_problems(run: Path) -> Iterator[str]:
    """Of committed steps: a bad one must never be."""
    folders = StepFolders(run)
    for step in folders.steps():
        if problems := find_problems(folders.of(step), step):
            yield f"the committed step {step} is bad: {join(problems)}"
    for name in folders.quarantined():
        yield f"a committed step was bad: quarantine/{name}"


def record_problems(
    found: Sequence[Record], expected: Sequence[Record], exact: bool, may_miss: Set[int] = frozenset()
) -> Iterator[str]:
    """Steps missing or recorded twice, and values that differ from the uninterrupted run's.

    Exact: to the last bit, all that does not tell of time or machine. Else what tells of the data is still
    exact, and losses and norms are within `BOUNDS`.
    """
    steps = [record["step"] for record in found]
    missing = set(range(1, max(steps, default=0) + 1)) - set(steps)
    if missing - may_miss or steps != sorted(set(steps)):
        yield f"records of steps {sorted(missing)} are missing, or some are not in order: {steps}"
    by_step = {record["step"]: record for record in expected}
    for record in found:
        for key, value in by_step[record["step"]].items():
            if key.startswith(_MEASURED):
                continue
            if exact or key in _OF_THE_DATA:
                if record.get(key) != value:
                    yield f"step {record['step']}: {key} {record.get(key)!r} is not {value!r}"
            elif key in BOUNDS and not abs(record[key] - value) <= BOUNDS[key] * abs(value):
                yield f"step {record['step']}: {key} {record[key]!r} is far from {value!r}"


def largest_gap(found: Sequence[Record], expected: Sequence[Record]) -> float:
    """Of losses, relative to the uninterrupted run's."""
    losses = {record["step"]: record["loss"] for record in expected}
    gaps = [abs(record["loss"] - losses[record["step"]]) / losses[record["step"]] for record in found]
    return max(gaps, default=0.0)


def final_problems(run: Path, reference: Path, step: int, exact: bool) -> Iterator[str]:
    """Of weights, Adam moments and EMA at the last step: other bits, or beyond `STATE_BOUND`."""
    for kind in KINDS:
        ours, theirs = (CheckpointStore(folder).read_full(step, kind) for folder in (run, reference))
        if {name: tensor.shape for name, tensor in ours.items()} != {n: t.shape for n, t in theirs.items()}:
            yield f"step {step}: other {kind} tensors than those of the uninterrupted run"
        elif exact:
            for name in theirs:
                if not torch.equal(ours[name], theirs[name]):
                    yield f"step {step}: {kind} {name} is not the uninterrupted run's"
        else:
            found, expected = (torch.cat([t[name].flatten() for name in theirs]) for t in (ours, theirs))
            gap = float((found - expected).norm() / expected.norm())
            if not gap <= STATE_BOUND:
                yield f"step {step}: {kind} is {gap:.1e} from the uninterrupted run's, relative to its norm"


def leftover_problems(run: Path, keep_last: int, has_saved: bool) -> Iterator[str]:
    """Of the files in the folder of a run that has finished.

    Old steps go when a new one is committed: those of a session that was killed just before stay until the next one
    `has_saved`.
    """
    names = {path.name for path in run.iterdir()}
    unfinished = sorted(name for name in names if name.startswith(".") or name == "run.lock")
    if unfinished:
        yield f"left in the run folder: {', '.join(unfinished)}"
    folders = StepFolders(run)
    steps = folders.steps()
    if has_saved and len(steps) > keep_last + 1:  # and the one that the session has resumed from
        yield f"{len(steps)} steps are kept, with keep_last {keep_last}"
    expected = {"LATEST", *(folders.of(step).name for step in steps)}
    unknown = sorted({path.name for path in folders.folder.iterdir()} - expected)
    if unknown:
        yield f"left in checkpoints: {', '.join(unknown)}"


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
