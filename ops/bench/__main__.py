"""`make bench`: every row of the table, measured side by side on this machine; see `ops/bench/LOG.md`."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from ops.bench.machine import measure_machine
from ops.bench.modules import in_new_process, module_rows
from ops.bench.report import Report
from pgm_scale.files import atomic_write_bytes, finite

MODULES = ("training", "optimizer", "sampling", "image", "data", "checkpoint", "startup")  # each NAME_rows.py
CUDA_MODULES = ("training", "optimizer", "sampling", "image")  # the others do not depend on the device
# How many of a module's first rows are timed again with malloc as it comes, which is how the published code runs:
# what it does with new memory decides most there.
DEFAULT_ALLOCATOR_ROWS = {"training": 2, "optimizer": 1, "sampling": 1}
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows on the CPU, then on the GPU if there is one; 1 if a module failed (or see --check)."""
    options = _parser().parse_args(arguments)
    exit_code = 0
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        names = [name for name in options.only if device == "cpu" or name in CUDA_MODULES]
        if not names:
            continue
        report = measure(torch.device(device), names)
        print(report.to_markdown())
        if options.out is not None:
            write(report, options.out)
        if report.failures or (options.check and report.missed):
            exit_code = 1
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ops.bench", description=__doc__)
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="write DEVICE.json and DEVICE.md here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser


def measure(device: torch.device, names: Sequence[str]) -> Report:
    """All rows of the modules; one that fails is reported, and the next one starts."""
    start_s = time.perf_counter()

    def progress(text: str) -> None:
        print(f"{time.perf_counter() - start_s:6.0f} s  {text}", file=sys.stderr, flush=True)

    progress(f"peaks of the {device.type}")
    report = Report(
        machine=measure_machine(device),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        versions={
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy")},
        },
    )
    for name in names:
        progress(name)
        rows, failure = in_new_process(module_rows, name, report.machine, True, None)
        if failure is None and device.type == "cpu" and name in DEFAULT_ALLOCATOR_ROWS:
            again, failure = in_new_process(
                module_rows, name, report.machine, False, DEFAULT_ALLOCATOR_ROWS[name]
            )
            rows += [replace(row, what=f"{row.what}; default allocator on both sides") for row in again]
        report.rows[name] = rows
        if failure is not None:
            report.failures[name] = failure
        for row in rows:
            progress(f"{name}: {row.what}: {row.value:.4g} {row.unit}")
    report.peaks_after = measure_machine(device).peaks
    return report


def write(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps(finite(report.to_json()), indent=1)
    atomic_write_bytes(folder / f"{report.file_stem}.json", as_json.encode() + b"\n")
    atomic_write_bytes(folder / f"{report.file_stem}.md", report.to_markdown().encode())


def _commit() -> str:
    """The commit of the checkout, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
