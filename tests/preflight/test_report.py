"""The table, the list of problems and the JSON file."""

import dataclasses
import json
from pathlib import Path

import pytest

from pgm_scale.parallel.hangs import Verdict
from pgm_scale.preflight.judgement import Limits, Place, RankReport, judge
from pgm_scale.preflight.report import add_hang, bad_nodes, find_problems, lines_of, print_report, write_json
from pgm_scale.preflight.rows import Row

LIMITS = Limits(0.85, 0.7)


def _reports(nodes: int) -> list[RankReport]:
    return [
        RankReport(
            Place(rank, f"gpu{rank // 2:03}", rank % 2, 1),
            rows=(Row("memory", "much", number=2.0**40),),
            versions={"torch": "2.15"},
            flops_per_s=(700 + rank % 2) * 1e12,
        )
        for rank in range(2 * nodes)
    ]


def _with(report: RankReport, *rows: Row) -> RankReport:
    return dataclasses.replace(report, rows=(*report.rows, *rows))


def test_equal_rows_of_many_nodes_are_one_problem() -> None:
    reports = _reports(4)
    bad = Row("disk", "is full", "bad", "make room", number=1.0)
    for rank in (2, 3, 6):
        reports[rank] = _with(reports[rank], dataclasses.replace(bad, number=float(rank)))
    reports[0] = _with(reports[0], Row("disk", "is slow", "warning"))
    (problem,) = find_problems(reports, "bad")
    assert problem.nodes == ("gpu001", "gpu003")
    assert problem.ranks == (2, 3, 6)
    assert str(problem) == "gpu[001,003]: disk: is full; make room"
    assert bad_nodes(reports) == ["gpu001", "gpu003"]
    assert list(lines_of(find_problems(reports, "warning"))) == ["gpu000: disk: is slow"]


def test_a_problem_of_each_of_a_hundred_nodes_is_a_few_lines() -> None:
    reports = [_with(report, Row("disk", f"rank {report.place.rank}", "bad")) for report in _reports(100)]
    lines = list(lines_of(find_problems(reports, "bad")))
    assert len(lines) < 12
    assert "gpu[004-099]" in lines[-1]


def test_a_table_of_128_nodes_is_readable(capsys: pytest.CaptureFixture) -> None:
    reports = _reports(128)
    reports[14] = dataclasses.replace(reports[14], flops_per_s=300e12)
    print_report(judge(reports, LIMITS))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 8
    assert max(map(len, lines)) <= 130
    (sound,) = (line for line in lines if line.rstrip().endswith("ok"))
    assert sound.startswith("gpu[000-006,008-127]")
    assert "700.0 TFLOP/s to 701.0 TFLOP/s" in sound
    (slow,) = (line for line in lines if "bad: matmul" in line)
    assert slow.startswith("gpu007")
    assert "300.0 TFLOP/s" in slow


def test_few_nodes_have_a_row_each(capsys: pytest.CaptureFixture) -> None:
    print_report(judge(_reports(3), LIMITS))
    output = capsys.readouterr().out
    assert all(f"gpu00{n} " in output for n in range(3))
    assert "torch 2.15" in output


def test_the_json_file_says_all_of_it(tmp_path: Path) -> None:
    reports = _reports(3)
    reports[4] = dataclasses.replace(reports[4], flops_per_s=350e12)
    reports[1] = _with(reports[1], Row("leftovers", "2 files", "warning", number=float("nan")))
    path = tmp_path / "preflight.json"
    write_json(path, judge(reports, LIMITS), LIMITS, finished=True)
    tree = json.loads(path.read_text())
    assert tree["verdict"] == "bad"
    assert tree["bad_nodes"] == ["gpu002"]
    (straggler,) = tree["stragglers"]
    assert (straggler["rank"], straggler["node"]) == (4, "gpu002")
    assert straggler["share_of_median"] == pytest.approx(0.5, rel=0.01)
    assert [(p["check"], p["nodes"]) for p in tree["problems"]] == [
        ("matmul", ["gpu002"]),
        ("leftovers", ["gpu000"]),
    ]
    statuses = {node: found["status"] for node, found in tree["nodes"].items()}
    assert statuses == {"gpu000": "warning", "gpu001": "ok", "gpu002": "bad"}
    assert [rank["place"]["rank"] for rank in tree["ranks"]] == list(range(6))
    add_hang(path, Verdict(0, "rank 2 has made no progress for 9 s", "", (), ("gpu001", "gpu002")))
    tree = json.loads(path.read_text())
    assert (tree["bad_nodes"], tree["hang"]) == (["gpu001", "gpu002"], "rank 2 has made no progress for 9 s")
    write_json(path, [], LIMITS, finished=False)
    assert json.loads(path.read_text())["verdict"] == "unfinished"
    assert [found.name for found in tmp_path.iterdir()] == ["preflight.json"]
