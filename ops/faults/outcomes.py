"""A pytest plugin that writes down what became of every test with a `fault` mark: `-p ops.faults.outcomes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ops.faults.cases import CASES

_OPTION = "--fault-outcomes"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, type=Path, required=True, help="the JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(
        config, "workerinput"
    ):  # pytest-xdist's workers send theirs to the process that started them
        config.pluginmanager.register(_Recorder(config.getoption(_OPTION)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            unknown = set(mark.args) - CASES.keys()
            if unknown or not mark.args:
                raise pytest.UsageError(
                    f"{item.nodeid}: fault{mark.args}: ops/faults/cases.py has no such case"
                )
            item.user_properties += [("fault", case) for case in mark.args]


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup, call and teardown of a test: it passed if all of them did; times are summed."""
        cases = sorted({int(str(value)) for name, value in report.user_properties if name == "fault"})
        if not cases:
            return
        entry = self._outcomes.setdefault(
            report.nodeid, {"cases": cases, "outcome": "passed", "seconds": 0.0}
        )
        entry["seconds"] = float(str(entry["seconds"])) + report.duration
        if not report.passed:
            entry["outcome"] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._outcomes, indent=1), encoding="utf-8")
