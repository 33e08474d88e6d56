"""`python -m ops.bench` with rows of known values in the place of measurements."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ops.bench import __main__ as bench
from ops.bench import modules
from ops.bench.machine import Machine
from ops.bench.measure import Resource, Row, Side, Target, ratio, take_turns

PEAKS: dict[Resource, float] = {"fp32 matmul": 4e9, "memory": 1e9, "disk write": 5e8}
MACHINE = Machine(torch.device("cpu"), "Some(R) CPU, 2 threads", 2, "2.0", PEAKS, {"addmm": 4e9})
SECONDS = {"plain": [3.0, 4.0, 8.0], "ours": [2.0, 1.0, 2.0]}


def row(value, target=None, unit="x"):
    return Row(
        f"work|{value}", value, unit, target, SECONDS, {"ours": 4e9}, {"ours": 0.5}, "fp32 matmul", "a note"
    )


@pytest.fixture
def rows_of(monkeypatch, tmp_path):
    """Runs the bench with these rows of module "data"; returns (exit code, JSON, Markdown)."""
    monkeypatch.setattr(bench, "measure_machine", lambda device: MACHINE)
    monkeypatch.setattr(modules, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(bench, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(rows, *options, names=("data",)):
        monkeypatch.setitem(sys.modules, "ops.bench.data_rows", SimpleNamespace(rows=rows))
        code = bench.main(["--only", *names, "--out", str(tmp_path), *options])
        stem = tmp_path / "some-r-cpu-2-threads"
        return code, json.loads(stem.with_suffix(".json").read_text()), stem.with_suffix(".md").read_text()

    return run


def test_table_says_what_holds_and_json_keeps_every_repeat(rows_of, capsys):
    target = Target(2.0, 2.5)
    rows = [row(1.9, target), row(2.0, target), row(2.5, target), row(9.0)]
    lower = Target(0.5, 0.2, lower_is_better=True)
    rows += [row(0.6, lower, "s"), row(0.5, lower, "s"), row(0.2, lower, "s")]
    code, result, table = rows_of(lambda machine: iter(rows))
    assert code == 0
    assert table in capsys.readouterr().out
    lines = [line for line in table.splitlines() if "work" in line]
    assert lines[0] == (
        "| work\\|1.9. a note | 1.9x | at least 2x, reach 2.5x | **no** | ours 50% (fp32 matmul) "
        "| plain 4 s (3 to 8, 3), ours 2 s (1 to 2, 3) |"
    )
    states = [line.split(" | ")[3].strip() for line in lines]
    assert states == ["**no**", "yes", "reached", "", "**no**", "yes", "reached"]
    assert "at most 0.5 s, reach 0.2 s" in lines[4]
    assert result["rows"]["data"][0]["seconds"] == SECONDS
    assert result["machine"]["peaks"] == result["peaks_after"] == PEAKS
    assert result["machine"]["device"] == "cpu"


def test_a_missed_target_fails_only_a_check(rows_of):
    missed = [row(1.0, Target(2.0, 3.0))]
    held = [row(2.0, Target(2.0, 3.0))]
    assert rows_of(lambda machine: iter(missed))[0] == 0
    assert rows_of(lambda machine: iter(missed), "--check")[0] == 1
    assert rows_of(lambda machine: iter(held), "--check")[0] == 0


def test_a_failing_module_is_a_line_and_an_exit_code_and_the_rest_is_measured(rows_of, monkeypatch, capsys):
    def rows(machine):
        yield row(3.0)
        raise ValueError("no such\nshard")

    startup = SimpleNamespace(rows=lambda machine: iter([row(7.0)]))
    monkeypatch.setitem(sys.modules, "ops.bench.startup_rows", startup)
    code, result, table = rows_of(rows, names=("data", "startup"))
    assert code == 1
    assert "**data failed** | ValueError: no such shard |" in table
    assert "3x" in table
    assert "7x" in table
    assert result["failures"] == {"data": "ValueError: no such\nshard"}
    assert "startup: work|7.0: 7 x" in capsys.readouterr().err


def test_fractions_are_rates_by_the_median_over_the_peak():
    sides = [Side("ours", print, 2e9, "fp32 matmul"), Side("plain", print, 1e9)]
    assert MACHINE.fractions(sides, SECONDS) == {"ours": 2e9 / 2.0 / 4e9}
    assert ratio(SECONDS, "plain", "ours") == 2.0


def test_sides_take_turns_in_turned_order_and_are_undone():
    done: list[str] = []
    sides = [Side(name, partial(done.append, name), undo=partial(done.append, f"-{name}")) for name in "ab"]
    seconds = take_turns(sides, repeats=2, warm_ups=1)
    assert done == ["b", "-b", "a", "-a", "a", "-a", "b", "-b", "b", "-b", "a", "-a"]
    assert {name: len(repeats) for name, repeats in seconds.items()} == {"a": 2, "b": 2}
