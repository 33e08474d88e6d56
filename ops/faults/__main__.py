"""`make faults`: inject every fault of `ops/faults/cases.py`, and say of each what became of it.

Runs the tests that have a `fault` mark, last those that need a real Slurm; prints a table and writes
`build/faults.json`. `--write` puts the table into the README. Exit code 1 if a test failed or a case has none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.faults.cases import CASES
from ops.readme import ROOT, write_section
from pgm_scale.files import atomic_write_bytes

_SLURM = "tests/slurm"


@dataclass(frozen=True)
class Result:
    """Of all tests of one case."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def held(self) -> bool:
        return self.passed > 0 and self.failed == 0

    def __str__(self) -> str:
        if self.failed:
            return f"FAILED: {self.failed} of {self.passed + self.failed} tests"
        if self.passed:
            return f"held, {self.passed} test{'s' * (self.passed > 1)}"
        return "not tried: its tests were skipped" if self.skipped else "NO TEST"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.faults", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    options = parser.parse_args(arguments)
    start_s = time.monotonic()
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    tests = run(["-n", "2", *marked_files()], build / "faults_here.json")
    tests |= run([_SLURM], build / "faults_slurm.json")
    seconds = time.monotonic() - start_s
    results = summary(tests)
    write_record(build / "faults.json", tests, seconds)
    for number, result in results.items():
        print(f"{number:3}  {CASES[number].fault}: {result}")
    bad = [
        number for number, result in results.items() if result.failed or not (result.passed or result.skipped)
    ]
    held = sum(result.held for result in results.values())
    print(f"{held} of {len(CASES)} cases held, {len(tests)} tests, {seconds / 60:.1f} minutes")
    if options.write:
        write_section("faults", table(results))
    return 1 if bad or not tests else 0


def marked_files() -> list[str]:
    """The test files without Slurm that have a mark: the others need not be imported."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [file for file in files if "mark.fault(" in file.read_text(encoding="utf-8")]
    return [str(file.relative_to(ROOT)) for file in marked if not file.is_relative_to(ROOT / _SLURM)]


def run(selection: list[str], outcomes: Path) -> dict[str, Any]:
    """The outcome of each marked test of a selection, by its name."""
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "fault", "-p", "ops.faults.outcomes"]
    finished = subprocess.run([*command, f"--fault-outcomes={outcomes}", *selection], cwd=ROOT, check=False)
    if finished.returncode not in (0, 1) or not outcomes.exists():
        raise SystemExit(f"pytest {' '.join(selection)} ended with {finished.returncode}")
    return json.loads(outcomes.read_bytes())


def summary(tests: dict[str, Any]) -> dict[int, Result]:
    """What became of every case, also of those without a test."""
    counts = {number: {"passed": 0, "failed": 0, "skipped": 0} for number in CASES}
    for test in tests.values():
        for number in test["cases"]:
            counts[number][test["outcome"]] += 1
    return {number: Result(**count) for number, count in counts.items()}


def write_record(path: Path, tests: dict[str, Any], seconds: float) -> None:
    content = {"seconds": seconds, "tests": tests}
    atomic_write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def table(results: dict[int, Result]) -> list[str]:
    return [
        "| | case | expected | outcome |",
        "|---|---|---|---|",
        *(f"| {n} | {CASES[n].fault} | {CASES[n].expected} | {result} |" for n, result in results.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
