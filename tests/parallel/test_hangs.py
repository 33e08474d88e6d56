"""The judgement alone: who is blamed for which last words of eight ranks."""

from __future__ import annotations

from typing import Any

from pgm_scale.holder import Holder
from pgm_scale.parallel.hangs import Beat, Culprit, Peer, Verdict, blamed_hosts, describe, find_culprits

TIMEOUT_S = 10.0
RANKS = 8


def peers(changes: dict[int, dict[str, Any]], **common: Any) -> list[Peer]:
    """Eight ranks that have waited for 12 s in step 5, but for the `changes` of some."""
    found = []
    for rank in range(RANKS):
        words = {"position": (5, 3), "still_s": 12.0, "waiting": True, **common, **changes.get(rank, {})}
        silence = words.pop("silence", "")
        process = Holder("node", "machine", 100 + rank, "1", "none")
        beat = {"number": 9, "phase": "forward", "ended": "", "failed": False, "stack": ()}
        found.append(Peer(Beat(rank, process, **{**beat, **words}), silence))
    return found


def blamed(
    changes: dict[int, dict[str, Any]], broken: bool = False, waits_are_hidden: bool = False, **common: Any
) -> list[int] | None:
    culprits = find_culprits(peers(changes, **common), TIMEOUT_S, broken, waits_are_hidden)
    return None if culprits is None else [culprit.beat.rank for culprit in culprits]


def test_nobody_is_blamed_while_one_makes_progress() -> None:
    assert blamed({3: {"still_s": 1.0, "waiting": False}}) is None
    assert blamed({3: {"still_s": 1.0, "waiting": False}, 4: {"silence": "is dead"}}) is None


def test_a_long_phase_of_all_is_no_hang() -> None:
    assert blamed({}, waiting=False) is None
    assert blamed({3: {"position": (5, 2)}}, waiting=False) is None


def test_the_silent_and_the_failed_come_first() -> None:
    assert blamed({3: {"waiting": False}, 4: {"silence": "is dead", "still_s": 0.0}}) == [4]
    assert blamed({3: {"waiting": False}, 5: {"ended": "ValueError", "failed": True, "still_s": 0.0}}) == [5]
    assert blamed({5: {"ended": "ValueError", "failed": True}, 6: {"silence": "is stopped"}}) == [6, 5]


def test_silence_after_the_end_is_no_crime() -> None:
    assert blamed({4: {"ended": "finished", "silence": "is dead"}, 3: {"waiting": False}}) == [3]


def test_of_those_at_work_the_furthest_behind() -> None:
    """A stage that computes for the ones after it has a higher count than they; yet they wait, and it does not."""
    assert blamed({2: {"waiting": False, "position": (5, 7)}, 6: {"position": (5, 0)}}) == [2]
    assert blamed({2: {"waiting": False, "position": (5, 2)}, 6: {"waiting": False}}) == [2]
    assert blamed({2: {"waiting": False, "position": (4, 9)}, 6: {"waiting": False}}) == [2]


def test_who_left_in_peace_is_waited_for() -> None:
    assert blamed({1: {"ended": "finished"}}) == [1]


def test_who_does_not_come_to_an_end() -> None:
    done = {rank: {"ended": "finished"} for rank in range(RANKS) if rank != 3}
    assert blamed({**done, 3: {"waiting": False}}) == [3]


def test_if_all_wait_the_furthest_behind() -> None:
    assert blamed({4: {"position": (5, 2)}}) == [4]
    assert blamed({}) == list(range(RANKS))


def test_on_gpus_waits_are_hidden() -> None:
    assert blamed({4: {"position": (5, 2)}}, waits_are_hidden=True, waiting=False) == [4]
    assert blamed({}, waits_are_hidden=True, waiting=False) is None


def test_a_broken_collective_needs_no_patience() -> None:
    assert blamed({4: {"silence": "is dead"}}, broken=True, still_s=0.5, waiting=False) == [4]
    assert blamed({}, broken=True, still_s=0.5) == []


def test_one_line_for_many_culprits() -> None:
    line = describe([Culprit(peer.beat, "is dead") for peer in peers({})])
    assert line.startswith('rank 0 (host node, pid 100) is dead, in "forward"; rank 1 (host node, pid 101) ')
    assert line.endswith("; and 4 more ranks")
    assert "\n" not in line


def test_hosts_are_blamed_unless_all_wait_for_each_other() -> None:
    """A network that is down is no host's fault: without all of them no job could run."""
    culprits = [Culprit(peer.beat, "is dead") for peer in peers({})]
    assert blamed_hosts(culprits[2:4], RANKS) == ("node",)
    assert blamed_hosts(culprits, RANKS) == ()
    assert blamed_hosts([], RANKS) == ()


def test_words_survive_the_store() -> None:
    beat = peers({0: {"stack": ("a.py:1 f", "b.py:2 g")}})[0].beat
    assert Beat.from_json(beat.to_json()) == beat
    verdict = Verdict(3, "line", "stacks", (beat.process,), ("gpu7",))
    assert Verdict.from_json(verdict.to_json()) == verdict
