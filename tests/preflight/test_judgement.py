"""Who is bad, from numbers alone."""

import dataclasses
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgm_scale.preflight.clocks import ClockOffset
from pgm_scale.preflight.judgement import (
    Limits,
    Place,
    RankReport,
    blame,
    judge,
    shares_of_median,
    stragglers,
    usual_offset_s,
)
from pgm_scale.preflight.network import AllReduce, ring_rounds
from pgm_scale.preflight.report import bad_nodes
from pgm_scale.preflight.rows import Row

LIMITS = Limits(matmul=0.85, link=0.7)


def _cluster(nodes: int, ranks_per_node: int = 2) -> list[RankReport]:
    """A sound one: rates within 2% of each other, equal versions, clocks within milliseconds."""
    names = [f"node{n}" for n in range(nodes)]
    ring = [pair for pairs in ring_rounds(names) for pair in pairs]
    reports = []
    for rank in range(nodes * ranks_per_node):
        node, local_rank = divmod(rank, ranks_per_node)
        groups = [AllReduce("node", (names[node],), ranks_per_node, True, 300e9 + rank)]
        groups += [
            AllReduce("pair", pair, 2 * ranks_per_node, True, 40e9 + rank)
            for pair in ring
            if names[node] in pair
        ]
        groups += [AllReduce("all", tuple(names), nodes * ranks_per_node, True, 39e9)]
        reports.append(
            RankReport(
                Place(rank, names[node], local_rank, 100 + rank),
                versions={"torch": "2.15", "kernel": "6.1"},
                flops_per_s=700e12 * (1 + 0.02 * (rank % 2)),
                clock=ClockOffset(0.001 * node, 0.0005) if local_rank == 0 else None,
                all_reduces=tuple(groups),
            )
        )
    return reports


def _rows(reports: list[RankReport], status: str) -> set[tuple[str, str]]:
    return {(r.place.node, row.check) for r in reports for row in r.rows if row.status == status}


@given(st.integers(1, 9), st.integers(1, 3))
def test_a_sound_cluster_has_no_bad_rows(nodes: int, ranks_per_node: int) -> None:
    judged = judge(_cluster(nodes, ranks_per_node), LIMITS)
    assert bad_nodes(judged) == []
    assert _rows(judged, "warning") == set()
    assert not stragglers(judged, LIMITS)


@given(st.integers(2, 12), st.data())
def test_a_minority_of_slow_ranks_is_named_and_nobody_else(nodes: int, data: st.DataObject) -> None:
    reports = _cluster(nodes)
    slow = data.draw(st.sets(st.integers(0, 2 * nodes - 1), max_size=nodes))  # half of them at most
    for rank in slow:
        reports[rank] = dataclasses.replace(reports[rank], flops_per_s=500e12)
    found = stragglers(reports, LIMITS)
    assert set(found) == slow
    assert all(share == pytest.approx(500 / 700, rel=0.03) for share in found.values())
    judged = judge(reports, LIMITS)
    assert bad_nodes(judged) == sorted({reports[rank].place.node for rank in slow})


@given(st.lists(st.floats(1, 1e15), min_size=1, max_size=20))
def test_shares_are_of_a_rate_that_is_there_and_half_are_at_least_it(rates: list[float]) -> None:
    shares = shares_of_median(rates)
    assert 1.0 in shares
    assert sum(share <= 1 for share in shares) > len(rates) / 2
    assert statistics.median_high(shares) == 1.0


def test_rates_of_zero_are_no_error() -> None:
    assert shares_of_median([0.0, 0.0]) == [1.0, 1.0]
    assert shares_of_median([0.0, 5.0]) == [0.0, 1.0]


@pytest.mark.parametrize("node", [0, 1, 3])
def test_another_version_on_one_node_is_that_nodes_fault(node: int) -> None:
    reports = _cluster(4)
    for rank in (2 * node, 2 * node + 1):
        reports[rank] = dataclasses.replace(reports[rank], versions={"torch": "2.14", "kernel": "6.1"})
    judged = judge(reports, LIMITS)
    assert _rows(judged, "bad") == {(f"node{node}", "torch")}
    (text,) = {row.value for row in judged[2 * node].rows if row.status == "bad"}
    assert text.startswith("2.14, but 2.15 on node[")
    assert f"node{node}" not in text


def test_between_two_halves_rank_0_is_right_and_an_absent_version_is_told() -> None:
    reports = _cluster(2)
    for rank in (2, 3):
        reports[rank] = dataclasses.replace(reports[rank], versions={"kernel": "6.1"})
    judged = judge(reports, LIMITS)
    assert _rows(judged, "bad") == {("node1", "torch")}
    assert any(row.value.startswith("none, but 2.15") for row in judged[2].rows)


def test_another_kernel_is_a_warning_and_a_rank_that_knows_no_versions_is_not_compared() -> None:
    reports = _cluster(3)
    reports[4] = dataclasses.replace(reports[4], versions={"torch": "2.15", "kernel": "6.2"})
    reports[0] = dataclasses.replace(reports[0], versions={})
    judged = judge(reports, LIMITS)
    assert _rows(judged, "bad") == set()
    assert _rows(judged, "warning") == {("node2", "kernel")}


@given(st.integers(3, 9), st.data())
def test_a_wrong_clock_is_named_also_rank_0s(nodes: int, data: st.DataObject) -> None:
    wrong = data.draw(st.integers(0, nodes - 1))
    skew_s = data.draw(st.sampled_from([-1e9, -3.0, 1.2, 60.0]))
    # Offsets are against rank 0's clock: if that is wrong, all others are ahead of it.
    reports = [
        dataclasses.replace(
            report,
            clock=report.clock
            and ClockOffset(skew_s * ((report.place.rank == 2 * wrong) - (wrong == 0)), 0.001),
        )
        for report in _cluster(nodes)
    ]
    judged = judge(reports, LIMITS)
    assert _rows(judged, "bad") == {(f"node{wrong}", "clock")}


def test_a_clock_is_not_blamed_within_what_the_round_trip_leaves_open() -> None:
    reports = _cluster(3)
    reports[2] = dataclasses.replace(reports[2], clock=ClockOffset(1.4, 0.5))
    assert _rows(judge(reports, LIMITS), "bad") == set()
    reports[2] = dataclasses.replace(reports[2], clock=ClockOffset(1.6, 0.5))
    assert _rows(judge(reports, LIMITS), "bad") == {("node1", "clock")}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
def test_the_usual_offset_has_the_most_company(offsets_s: list[float]) -> None:
    def company(one: float) -> int:
        return len([other for other in offsets_s if abs(one - other) <= 1])

    assert company(usual_offset_s(offsets_s)) == max(map(company, offsets_s))


def _ring(nodes: int) -> list[tuple[str, str]]:
    return [pair for pairs in ring_rounds([f"node{n}" for n in range(nodes)]) for pair in pairs]


@given(st.integers(3, 12), st.data())
def test_faulty_nodes_of_a_ring_are_blamed(nodes: int, data: st.DataObject) -> None:
    faulty = {f"node{n}" for n in data.draw(st.sets(st.integers(0, nodes - 1)))}
    ring = _ring(nodes)
    blamed, links = blame({pair: not faulty.isdisjoint(pair) for pair in ring})
    assert faulty <= blamed
    for node in blamed - faulty:  # only one between two faulty ones looks faulty too
        assert {end for pair in ring if node in pair for end in pair} - {node} <= faulty
    assert links == []


@given(st.integers(3, 12), st.data())
def test_one_faulty_link_blames_nobody(nodes: int, data: st.DataObject) -> None:
    ring = _ring(nodes)
    link = data.draw(st.sampled_from(ring))
    assert blame({pair: pair == link for pair in ring}) == (set(), [link])


def test_a_node_that_is_known_explains_its_pairs() -> None:
    assert blame({("a", "b"): True}, ["b"]) == (set(), [])
    assert blame({("a", "b"): True}) == (set(), [("a", "b")])
    ring = {("a", "b"): True, ("b", "c"): True, ("c", "a"): False}
    assert blame(ring) == ({"b"}, [])


def _change(reports: list[RankReport], scope: str, nodes: set[str], **changes: object) -> list[RankReport]:
    """Change what was seen of groups of that scope in which any (of pairs: all, if two are given) take part."""
    return [
        dataclasses.replace(
            report,
            all_reduces=tuple(
                dataclasses.replace(group, **changes)  # type: ignore[arg-type]
                if group.scope == scope and (nodes <= set(group.nodes))
                else group
                for group in report.all_reduces
            ),
        )
        for report in reports
    ]


@pytest.mark.parametrize("nodes", [3, 4, 7])
def test_a_slow_node_is_slow_with_all_its_neighbours(nodes: int) -> None:
    judged = judge(_change(_cluster(nodes), "pair", {"node1"}, bytes_per_s=9e9), LIMITS)
    assert _rows(judged, "bad") == {("node1", "all-reduce between")}
    assert _rows(judged, "warning") == set()


def test_a_slow_link_is_named_and_excludes_nobody() -> None:
    judged = judge(_change(_cluster(5), "pair", {"node1", "node2"}, bytes_per_s=9e9), LIMITS)
    assert bad_nodes(judged) == []
    warned = {("node1", "all-reduce between"), ("node2", "all-reduce between")}
    assert _rows(judged, "warning") == warned
    assert any("slow link node1 - node2" in row.value for row in judged[2].rows)


def test_a_node_that_is_slow_inside_is_named() -> None:
    judged = judge(_change(_cluster(4), "node", {"node3"}, bytes_per_s=100e9), LIMITS)
    assert _rows(judged, "bad") == {("node3", "all-reduce inside")}


def test_a_wrong_sum_inside_a_node_explains_all_others() -> None:
    reports = _cluster(4)
    for scope in ("node", "pair"):
        reports = _change(reports, scope, {"node2"}, exact=False)
    reports = _change(reports, "all", set(), exact=False)
    judged = judge(reports, LIMITS)
    assert bad_nodes(judged) == ["node2"]


def test_a_wrong_sum_between_two_nodes_excludes_both() -> None:
    judged = judge(_change(_cluster(5), "pair", {"node0", "node4"}, exact=False), LIMITS)
    assert bad_nodes(judged) == ["node0", "node4"]
    assert bad_nodes(judge(_change(_cluster(2), "pair", {"node0"}, exact=False), LIMITS)) == [
        "node0",
        "node1",
    ]


def test_a_wrong_sum_that_only_all_together_see_is_told_by_those_who_see_it() -> None:
    reports = _cluster(3)
    reports[3:4] = _change(reports[3:4], "all", set(), exact=False)
    judged = judge(reports, LIMITS)
    assert _rows(judged, "bad") == {("node1", "all-reduce")}


def test_a_node_with_fewer_tasks() -> None:
    assert _rows(judge(_cluster(3)[:5], LIMITS), "warning") == {("node2", "tasks")}


def test_less_memory_than_the_others() -> None:
    reports = [
        dataclasses.replace(report, rows=(Row("memory", "much", number=1e12),)) for report in _cluster(3, 1)
    ]
    assert _rows(judge(reports, LIMITS), "warning") == set()
    reports[1] = dataclasses.replace(reports[1], rows=(Row("memory", "half", number=0.5e12),))
    assert _rows(judge(reports, LIMITS), "warning") == {("node1", "memory")}


def test_limits_of_devices() -> None:
    assert Limits.on("cuda").matmul > Limits.on("cpu").matmul
    assert Limits.on("cuda", 0.9) == dataclasses.replace(Limits.on("cuda"), matmul=0.9)
