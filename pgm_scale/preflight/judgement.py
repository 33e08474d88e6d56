"""Who is bad, from what all ranks found: no input or output, no process group.

The majority is right; between two equal halves, rank 0's. Rates are compared with those of the others, never with
a data sheet.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pgm_scale.preflight.clocks import ClockOffset
from pgm_scale.preflight.network import AllReduce, Scope
from pgm_scale.preflight.rows import Row, Status, fold_names

Value = TypeVar("Value", bound=Hashable)

_CLOCK_TOLERANCE_S = 1.0
_MEMORY_FRACTION = 0.9  # firmware takes a little more or less
# Differences that change no number: told, but no reason to exclude a node.
_HARMLESS = frozenset({"kernel", "processors"})


@dataclass(frozen=True)
class Place:
    """A rank and where it runs."""

    rank: int
    node: str
    local_rank: int
    pid: int


@dataclass(frozen=True)
class RankReport:
    """All that one rank has found. `clock` is None except on the first rank of each node."""

    place: Place
    rows: tuple[Row, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flops_per_s: float | None = None
    clock: ClockOffset | None = None
    all_reduces: tuple[AllReduce, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Fractions below which a rate is too slow beside the others'.

    Attributes:
        matmul: of the median rank. GPUs of one kind are within about 3% of each other.
        link: of the median node inside nodes, of the upper quartile of pairs between them. Pairs behind one switch
            are faster than others, hence looser.
    """

    matmul: float
    link: float

    @classmethod
    def on(cls, device_type: str, matmul: float | None = None) -> Limits:
        """Those of GPUs, or looser ones of CPUs, which ranks share with each other and with everything else."""
        defaults = cls(0.85, 0.7) if device_type == "cuda" else cls(0.5, 0.1)
        return defaults if matmul is None else dataclasses.replace(defaults, matmul=matmul)


def judge(reports: Sequence[RankReport], limits: Limits) -> list[RankReport]:
    """The reports, in rank order, with the rows that only all of them together give."""
    added: defaultdict[int, list[Row]] = defaultdict(list)
    for rank, row in (
        *_judge_places(reports),
        *_judge_versions(reports),
        *_judge_memory(reports),
        *_judge_clocks(reports),
        *_judge_matmul(reports, limits.matmul),
        *_judge_network(reports, limits.link),
    ):
        added[rank].append(row)
    return [dataclasses.replace(r, rows=(*r.rows, *added[r.place.rank])) for r in reports]


def ranks_by_node(places: Iterable[Place]) -> dict[str, list[int]]:
    """The ranks of each node, first rank first; nodes in the order of their first ranks."""
    ranks: dict[str, list[int]] = {}
    for place in sorted(places, key=lambda place: place.rank):
        ranks.setdefault(place.node, []).append(place.rank)
    return ranks


def majority(values: Iterable[Value]) -> Value:
    """The most frequent value; the first of those that are equally frequent."""
    return Counter(values).most_common(1)[0][0]


def usual_offset_s(offsets_s: Sequence[float]) -> float:
    """The offset that most others are within the tolerance of; the first of those with equally many."""
    return max(offsets_s, key=lambda one: sum(abs(one - other) <= _CLOCK_TOLERANCE_S for other in offsets_s))


def shares_of_median(rates: Sequence[float]) -> list[float]:
    """Each rate over the median; the upper one of an even number, so that one slow half is seen as slow."""
    median = statistics.median_high(rates)
    return [rate / median if median > 0 else 1.0 for rate in rates]


def stragglers(reports: Sequence[RankReport], limits: Limits) -> dict[int, float]:
    """Ranks that multiply matrices too slowly, and their share of the median rate."""
    measured = [(r.place.rank, r.flops_per_s) for r in reports if r.flops_per_s is not None]
    if not measured:
        return {}
    shares = shares_of_median([rate for _, rate in measured])
    return {rank: share for (rank, _), share in zip(measured, shares, strict=True) if share < limits.matmul}


def blame(
    pairs: Mapping[tuple[str, str], bool], known: Iterable[str] = ()
) -> tuple[set[str], list[tuple[str, str]]]:
    """The nodes that explain the faulty pairs of a ring, and the faulty pairs that no node explains.

    A node is to blame if it has two pairs or more and all are faulty.

    Args:
        pairs: each pair of nodes, and whether it is faulty.
        known: nodes already known to be at fault, which explain their pairs.
    """
    mine: defaultdict[str, list[bool]] = defaultdict(list)
    for (one, other), faulty in pairs.items():
        if other not in known:
            mine[one].append(faulty)
        if one not in known:
            mine[other].append(faulty)
    blamed = {node for node, faults in mine.items() if len(faults) >= 2 and all(faults)}
    explained = blamed | set(known)
    return blamed, [pair for pair, faulty in pairs.items() if faulty and explained.isdisjoint(pair)]


def _judge_places(reports: Sequence[RankReport]) -> Iterator[tuple[int, Row]]:
    nodes = ranks_by_node(report.place for report in reports)
    usual = majority(len(ranks) for ranks in nodes.values())
    for ranks in nodes.values():
        if len(ranks) != usual:
            to_do = "set --ntasks-per-node"
            yield ranks[0], Row("tasks", f"{len(ranks)}, other nodes have {usual}", "warning", to_do)


def _judge_versions(reports: Sequence[RankReport]) -> Iterator[tuple[int, Row]]:
    reports = [report for report in reports if report.versions]  # others have a bad row already
    for name in sorted({name for report in reports for name in report.versions}):
        values = [report.versions.get(name, "none") for report in reports]
        right = majority(values)
        if all(value == right for value in values):
            continue
        nodes = fold_names(r.place.node for r, value in zip(reports, values, strict=True) if value == right)
        for report, value in zip(reports, values, strict=True):
            if value != right:
                status: Status = "warning" if name in _HARMLESS else "bad"
                text = f"{value}, but {right} on {nodes}"
                yield report.place.rank, Row(name, text, status, "make all nodes equal")


def _judge_memory(reports: Sequence[RankReport]) -> Iterator[tuple[int, Row]]:
    found = [(r.place.rank, row) for r in reports for row in r.rows if row.check == "memory" and row.number]
    shares = shares_of_median([row.number or 0.0 for _, row in found]) if found else []
    for (rank, _), share in zip(found, shares, strict=True):
        if share < _MEMORY_FRACTION:
            text = f"{share:.2f} of what other nodes have"
            yield rank, Row("memory", text, "warning", "look for a broken memory module or a lower limit")


def _judge_clocks(reports: Sequence[RankReport]) -> Iterator[tuple[int, Row]]:
    clocks = [(report.place.rank, report.clock) for report in reports if report.clock is not None]
    if not clocks:
        return
    right_s = usual_offset_s([clock.offset_s for _, clock in clocks])
    for rank, clock in clocks:
        skew_s = clock.offset_s - right_s
        text = f"{skew_s:+.3f} s (to {clock.bound_s * 1000:.1f} ms)"
        if abs(skew_s) - clock.bound_s <= _CLOCK_TOLERANCE_S:
            yield rank, Row("clock", text, number=skew_s)
        else:
            to_do = "start time synchronisation (chronyd, ntpd) on the node"
            yield rank, Row("clock", f"{text} against most nodes", "bad", to_do, skew_s)


def _judge_matmul(reports: Sequence[RankReport], fraction: float) -> Iterator[tuple[int, Row]]:
    measured = [(r.place.rank, r.flops_per_s) for r in reports if r.flops_per_s is not None]
    shares = shares_of_median([rate for _, rate in measured]) if measured else []
    for (rank, rate), share in zip(measured, shares, strict=True):
        text = flops_text(rate)
        if share >= fraction:
            yield rank, Row("matmul", text, number=rate)
        else:
            to_do = "look at its clocks, its temperature and who else uses it"
            text = f"rank {rank}: {text}, {share:.2f} of the median rank"
            yield rank, Row("matmul", text, "bad", to_do, rate)


@dataclass(frozen=True)
class _Group:
    """What all ranks of one group saw: exact if all did, and the slowest one's bandwidth."""

    exact: bool
    bytes_per_s: float


def _groups(reports: Sequence[RankReport], scope: Scope) -> dict[tuple[str, ...], _Group]:
    seen: defaultdict[tuple[str, ...], list[AllReduce]] = defaultdict(list)
    for report in reports:
        for found in report.all_reduces:
            if found.scope == scope:
                seen[found.nodes].append(found)
    return {
        nodes: _Group(all(f.exact for f in found), min(f.bytes_per_s for f in found))
        for nodes, found in seen.items()
    }


def _judge_network(reports: Sequence[RankReport], fraction: float) -> Iterator[tuple[int, Row]]:
    first = {node: ranks[0] for node, ranks in ranks_by_node(r.place for r in reports).items()}
    inside = {nodes[0]: group for nodes, group in _groups(reports, "node").items()}
    pairs = {(nodes[0], nodes[1]): group for nodes, group in _groups(reports, "pair").items()}
    wrong = {node for node, group in inside.items() if not group.exact}
    yield from ((first[node], row) for node, row in _inside_rows(inside, fraction))
    blamed, links = blame({pair: not group.exact for pair, group in pairs.items()}, wrong)
    # A sum that is wrong is bad for both ends of a link; a slow link alone excludes nobody.
    wrong |= blamed | {node for link in links for node in link}
    slow_nodes, slow_links = _slow(pairs, fraction)
    for node in first:
        mine = {pair: group for pair, group in pairs.items() if node in pair}
        if mine:
            yield first[node], _pair_row(node, mine, wrong, slow_nodes, slow_links)
    for nodes, group in _groups(reports, "all").items():
        text = f"{rate_text(group.bytes_per_s)} over {len(reports)} ranks on {len(nodes)} node(s)"
        yield reports[0].place.rank, Row("all-reduce", text, number=group.bytes_per_s)
    if not wrong:  # else it is explained
        for report in reports:
            if any(found.scope == "all" and not found.exact for found in report.all_reduces):
                yield report.place.rank, _wrong_sum("all-reduce", f"rank {report.place.rank} of all ranks")


def _inside_rows(inside: Mapping[str, _Group], fraction: float) -> Iterator[tuple[str, Row]]:
    shares = shares_of_median([group.bytes_per_s for group in inside.values()]) if inside else []
    for (node, group), share in zip(inside.items(), shares, strict=True):
        text = rate_text(group.bytes_per_s)
        if not group.exact:
            yield node, _wrong_sum("all-reduce inside", "inside the node")
        elif share >= fraction:
            yield node, Row("all-reduce inside", text, number=group.bytes_per_s)
        else:
            text, to_do = (
                f"{text}, {share:.2f} of the median node",
                "look at its NVLink and PCIe (nvidia-smi topo -m)",
            )
            yield node, Row("all-reduce inside", text, "bad", to_do, group.bytes_per_s)


def _slow(pairs: Mapping[tuple[str, str], _Group], fraction: float) -> tuple[set[str], list[tuple[str, str]]]:
    """Against the upper quartile: one bad node of three spoils two pairs of three."""
    if len(pairs) < 2:
        return set(), []
    rates = sorted(group.bytes_per_s for group in pairs.values())
    usual = rates[math.ceil(0.75 * len(rates)) - 1]
    return blame({pair: group.bytes_per_s < fraction * usual for pair, group in pairs.items()})


def _pair_row(
    node: str,
    mine: Mapping[tuple[str, str], _Group],
    wrong: set[str],
    slow_nodes: set[str],
    slow_links: list[tuple[str, str]],
) -> Row:
    name = "all-reduce between"
    text = ", ".join(
        f"{rate_text(group.bytes_per_s)} with {other}"
        for pair, group in mine.items()
        for other in pair
        if other != node
    )
    slowest = min(group.bytes_per_s for group in mine.values())
    if node in wrong and not all(group.exact for group in mine.values()):
        others = sorted({end for pair, group in mine.items() if not group.exact for end in pair} - {node})
        return _wrong_sum(name, f"with {', '.join(others)}")
    if node in slow_nodes:
        to_do = "look at its network adapters and cables; NCCL_DEBUG=INFO names the transport"
        return Row(name, f"slow with all its neighbours: {text}", "bad", to_do, slowest)
    links = [pair for pair in slow_links if node in pair]
    if links:
        to_do = "look at the cable and switch between them; one node alone may be fine"
        slow = "; ".join(f"slow link {one} - {other}" for one, other in links)
        return Row(name, f"{slow}: {text}", "warning", to_do, slowest)
    return Row(name, text, number=slowest)


def _wrong_sum(check: str, where: str) -> Row:
    return Row(
        check, f"wrong sum {where}", "bad", "do not train there: drain it and test GPU, adapter and cable"
    )


def flops_text(rate: float) -> str:
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"


def rate_text(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
