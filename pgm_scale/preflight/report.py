"""What the preflight tells: a table of nodes, the problems with what to do, and the JSON file for programs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from pgm_scale.files import atomic_write_bytes, finite
from pgm_scale.parallel.hangs import Verdict
from pgm_scale.preflight.judgement import (
    Limits,
    RankReport,
    flops_text,
    majority,
    ranks_by_node,
    rate_text,
    stragglers,
)
from pgm_scale.preflight.rows import Row, Status, fold_names, worst

Outcome = Literal["ok", "warning", "bad", "unfinished"]

_SHOWN_NODES = 8  # more are folded by what is wrong with them
_SHOWN_PROBLEMS = 8  # of one check
_WIDTH = 130  # where the output is a log file
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("matmul", "matmul", flops_text),
    ("all-reduce inside", "inside", rate_text),
    ("all-reduce between", "between", rate_text),
    ("clock", "clock", lambda skew_s: f"{skew_s:+.3f} s"),
    ("run folder", "run folder", rate_text),
    ("memory", "memory", lambda size_bytes: f"{size_bytes / 2**30:.0f} GiB"),
)
_SHOWN_VERSIONS = (
    "pgm-scale",
    "python",
    "torch",
    "deepspeed",
    "megatron-core",
    "CUDA",
    "NCCL",
    "driver",
    "GPU",
)


@dataclass(frozen=True)
class Problem:
    """Rows that say the same of several ranks."""

    row: Row
    nodes: tuple[str, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        to_do = f"; {self.row.to_do}" if self.row.to_do else ""
        return f"{fold_names(self.nodes)}: {self.row.check}: {self.row.value}{to_do}"


def find_problems(reports: Iterable[RankReport], status: Status) -> list[Problem]:
    """All rows of that status, equal ones folded, sorted by check and node."""
    found: dict[Row, list[RankReport]] = {}
    for report in reports:
        for row in dict.fromkeys(dataclasses.replace(row, number=None) for row in report.rows):
            if row.status == status:
                found.setdefault(row, []).append(report)
    problems = [
        Problem(row, tuple(sorted({r.place.node for r in mine})), tuple(r.place.rank for r in mine))
        for row, mine in found.items()
    ]
    return sorted(problems, key=lambda problem: (problem.row.check, problem.nodes, problem.ranks))


def bad_nodes(reports: Iterable[RankReport]) -> list[str]:
    """Nodes with anything bad on any of their ranks, sorted: those that a job should not be given."""
    return sorted({r.place.node for r in reports if any(row.status == "bad" for row in r.rows)})


def lines_of(problems: Sequence[Problem]) -> Iterator[str]:
    """One line a problem; of many of one check the first, and how many more there are."""
    by_check: dict[str, list[Problem]] = {}
    for problem in problems:
        by_check.setdefault(problem.row.check, []).append(problem)
    for check, mine in by_check.items():
        yield from map(str, mine[:_SHOWN_PROBLEMS])
        hidden = {node for problem in mine[_SHOWN_PROBLEMS:] for node in problem.nodes}
        if hidden:
            yield f"{fold_names(hidden)}: {check}: alike; --json has each one"


def print_report(reports: Sequence[RankReport]) -> None:
    """Versions that most ranks have, a row for each node or kind of nodes, and the warnings."""
    # Brackets of folded node names are no markup; a log file has no width of its own.
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    versions = (
        f"{name} {majority(report.versions[name] for report in reports if name in report.versions)}"
        for name in _SHOWN_VERSIONS
        if any(name in report.versions for report in reports)
    )
    console.print(", ".join(versions))
    for row in reports[0].rows:
        if row.check == "all-reduce":
            console.print(f"{row.check}: {row.value}")
    table = Table("nodes", "ranks", *(title for _, title, _ in _COLUMNS), "found", box=None, pad_edge=False)
    for names, members in _table_rows(reports):
        ranks = f"{len(members)}"
        table.add_row(
            fold_names(names), ranks, *(_cell(members, *column) for column in _COLUMNS), _found(members)
        )
    console.print(table)
    for line in lines_of(find_problems(reports, "warning")):
        console.print(f"warning: {line}", soft_wrap=True)


def _table_rows(reports: Sequence[RankReport]) -> Iterator[tuple[list[str], list[RankReport]]]:
    by_rank = {report.place.rank: report for report in reports}
    nodes = {
        node: [by_rank[rank] for rank in ranks]
        for node, ranks in ranks_by_node(r.place for r in reports).items()
    }
    if len(nodes) <= _SHOWN_NODES:
        yield from (([node], members) for node, members in nodes.items())
        return
    alike: dict[str, list[str]] = {}
    for node, members in nodes.items():
        alike.setdefault(_found(members), []).append(node)
    for names in alike.values():
        yield names, [member for node in names for member in nodes[node]]


def _found(members: Iterable[RankReport]) -> str:
    worst_of: dict[str, Status] = {}
    for row in (row for report in members for row in report.rows):
        worst_of[row.check] = worst([worst_of.get(row.check, "ok"), row.status])
    names: dict[Status, list[str]] = {}
    for check, status in sorted(worst_of.items()):
        names.setdefault(status, []).append(check)
    statuses: tuple[Status, ...] = ("bad", "warning")
    return "; ".join(f"{s}: {', '.join(names[s])}" for s in statuses if s in names) or "ok"


def _cell(members: Iterable[RankReport], check: str, title: str, text: Callable[[float], str]) -> str:
    """The least and the largest of the ranks' numbers."""
    numbers = [row.number for r in members for row in r.rows if row.check == check and row.number is not None]
    if not numbers:
        return "-"
    least, largest = text(min(numbers)), text(max(numbers))
    return least if least == largest else f"{least} to {largest}"


def write_json(path: str | Path, reports: Sequence[RankReport], limits: Limits, finished: bool) -> None:
    """Replace the file, whole or not at all. An unfinished one is what is left if the all-reduces hang."""
    content = finite(to_mapping(reports, limits, finished))
    atomic_write_bytes(Path(path), (json.dumps(content, indent=1) + "\n").encode())


def add_hang(path: str | Path, verdict: Verdict) -> None:
    """Say in an unfinished file how the preflight ended, and exclude the nodes that are to blame."""
    tree = json.loads(Path(path).read_bytes())
    tree |= {"hang": verdict.line, "bad_nodes": sorted({*verdict.hosts, *tree["bad_nodes"]})}
    atomic_write_bytes(Path(path), (json.dumps(tree, indent=1) + "\n").encode())


def to_mapping(reports: Sequence[RankReport], limits: Limits, finished: bool) -> dict[str, Any]:
    """Plain containers; `bad_nodes` is what `launch --exclude` reads."""
    nodes = ranks_by_node(report.place for report in reports)
    rows_of = {
        node: [row for r in reports if r.place.rank in set(ranks) for row in r.rows]
        for node, ranks in nodes.items()
    }
    verdict: Outcome = worst(row.status for rows in rows_of.values() for row in rows)
    by_rank = {report.place.rank: report for report in reports}
    statuses: tuple[Status, ...] = ("bad", "warning")
    return {
        "verdict": verdict if finished else "unfinished",
        "unix_time_s": time.time(),
        "ranks_total": len(reports),
        "bad_nodes": bad_nodes(reports),
        "stragglers": [
            {"rank": rank, "node": by_rank[rank].place.node, "share_of_median": share}
            for rank, share in stragglers(reports, limits).items()
        ],
        "problems": [
            {**dataclasses.asdict(p.row), "nodes": list(p.nodes), "ranks": list(p.ranks)}
            for status in statuses
            for p in find_problems(reports, status)
        ],
        "nodes": {
            node: {"ranks": nodes[node], "status": worst(row.status for row in rows)}
            for node, rows in rows_of.items()
        },
        "ranks": [dataclasses.asdict(report) for report in reports],
    }
