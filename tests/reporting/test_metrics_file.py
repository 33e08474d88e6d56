"""`metrics.jsonl` of runs that were resumed, killed, damaged, or are still going."""

import json
import math

import pytest

from pgm_scale.errors import UserError
from pgm_scale.reporting.metrics_file import number, read_metrics
from tests.reporting.written import record


def test_the_last_record_of_a_step_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [record(2, loss=1.0), record(4, loss=2.0), record(6, loss=3.0), record(4, loss=4.0)]
    path.write_text("".join(json.dumps(one) + "\n" for one in written))
    assert [(one["step"], one["loss"]) for one in read_metrics(path)] == [(2, 1.0), (4, 4.0), (6, 3.0)]


def test_a_file_that_ends_anywhere_gives_its_whole_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record(step)).encode() for step in (1, 2, 3)]
    content = b"\n".join(lines) + b"\n"
    ends = [sum(len(line) + 1 for line in lines[: count + 1]) - 1 for count in range(3)]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        assert len(read_metrics(path)) == sum(cut >= end for end in ends)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "\0\0",
        "[1]",
        '"a"',
        "{}",
        '{"step": "1"}',
        '{"step": true}',
        '{"step": -1}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(record(1))
    path.write_bytes(f"{good}\n\n{line}\n{good}\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"metrics.jsonl: line 3 is damaged .*; delete that line$"):
        read_metrics(path)
    path.write_bytes(f"{good}\n{line}\n".encode("latin-1"))  # whole, so no writer is in the middle of it
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(path)
    path.write_bytes(f"{good}\n{line}".encode("latin-1"))
    assert len(read_metrics(path)) == 1


def test_a_missing_file_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read .*nowhere: No such file or directory; give"):
        read_metrics(tmp_path / "nowhere")


def test_only_finite_numbers_are_numbers():
    assert number(3) == 3.0
    assert number(-0.5) == -0.5
    for value in (None, True, "3", [3], math.nan, math.inf, 10**400):
        assert number(value) is None
