"""Who hangs: a judgement from what the ranks last said of themselves. No input or output, no threads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pgm_scale.holder import Holder

_SHOWN_CULPRITS = 4


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself about every second.

    Attributes:
        number: counts the beats; it stands still when the process is stopped or dead.
        position: the training step, and how many times the rank has reported progress since its start.
        phase: what it reported last.
        still_s: seconds for which it has reported nothing new.
        waiting: the innermost Python frame is in a library that communicates: it waits for other ranks.
        ended: how its session has ended, "" while it goes on.
        failed: it has ended by an error of its own.
        stack: innermost frame last.
    """

    rank: int
    process: Holder
    number: int
    position: tuple[int, int]
    phase: str
    still_s: float
    waiting: bool
    ended: str
    failed: bool
    stack: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Beat:
        fields = json.loads(text)
        for name in ("position", "stack"):
            fields[name] = tuple(fields[name])
        return Beat(**{**fields, "process": Holder(**fields["process"])})

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.process.host}, pid {self.process.pid})"


@dataclass(frozen=True)
class Peer:
    """A rank as the judge sees it: its last beat, and, if no new ones come, what is known of its process."""

    beat: Beat
    silence: str = ""


@dataclass(frozen=True)
class Culprit:
    """A rank and what it is blamed for; a silent one cannot end itself."""

    beat: Beat
    reason: str
    silent: bool = False

    def __str__(self) -> str:
        return f'{self.beat} {self.reason}, in "{self.beat.phase}"'

    def stack(self) -> str:
        lines = "".join(f"    {line}\n" for line in self.beat.stack)
        return f"last stack of {self.beat}, innermost call last:\n{lines}"


@dataclass(frozen=True)
class Verdict:
    """What all ranks say when they end: one `line`, and the `stacks` of the culprits, printed by rank `maker`.

    Attributes:
        silent: the processes that cannot end themselves.
        hosts: see `blamed_hosts`.
    """

    maker: int
    line: str
    stacks: str
    silent: tuple[Holder, ...]
    hosts: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Verdict:
        fields = json.loads(text)
        silent = tuple(Holder(**process) for process in fields["silent"])
        return Verdict(**{**fields, "silent": silent, "hosts": tuple(fields["hosts"])})


def find_culprits(
    peers: Sequence[Peer], timeout_s: float, broken: bool, waits_are_hidden: bool
) -> list[Culprit] | None:
    """The ranks for which the others wait; None when the run goes on; empty when it is nobody's fault.

    Nobody is blamed while any living rank makes progress: a slow rank is not a hung one. Then the first of

    1. silent ranks (stopped or dead), and those that ended by an error of their own;
    2. of the ranks at work outside of any collective, those that are furthest behind;
    3. ranks that have left the run in peace while others still wait;
    4. if all wait for each other, those that are furthest behind.

    All ranks at work, none waiting, is a long phase and not a hang. If `waits_are_hidden`, which is so on GPUs,
    where Python sees no collective, it is a long phase only if all ranks are in the same one.

    Args:
        peers: all ranks.
        broken: a collective has failed on a rank, so the run cannot go on whatever the others do.
    """
    living = [peer.beat for peer in peers if not peer.beat.ended and not peer.silence]
    still = [beat for beat in living if beat.still_s >= timeout_s]
    if not broken and len(still) < len(living):
        return None
    gone = [peer for peer in peers if peer.silence and not peer.beat.ended]
    silent = [Culprit(peer.beat, peer.silence, silent=True) for peer in gone]
    failed = [Culprit(peer.beat, f"has failed ({peer.beat.ended})") for peer in peers if peer.beat.failed]
    if silent or failed:
        return silent + failed
    working = [beat for beat in still if not beat.waiting]
    waiting = [beat for beat in still if beat.waiting]
    left = [peer.beat for peer in peers if peer.beat.ended]
    apart = waits_are_hidden and len({beat.position for beat in working}) > 1
    if working and (waiting or left or broken or apart):
        return [Culprit(beat, _standstill(beat, "outside of any collective")) for beat in _last(working)]
    if working:
        return None
    if left:
        return [Culprit(beat, f"has left the run ({beat.ended})") for beat in left]
    return [Culprit(beat, _standstill(beat, "waiting like all others")) for beat in _last(waiting)]


def _standstill(beat: Beat, where: str) -> str:
    return f"has made no progress for {beat.still_s:.0f} s, {where}"


def _last(beats: Sequence[Beat]) -> list[Beat]:
    behind = min((beat.position for beat in beats), default=(0, 0))
    return [beat for beat in beats if beat.position == behind]


def blamed_hosts(culprits: Sequence[Culprit], ranks: int) -> tuple[str, ...]:
    """Whose fault it is, sorted; none if the culprits are all of the `ranks`: they wait for each other."""
    if len(culprits) == ranks:
        return ()
    return tuple(sorted({culprit.beat.process.host for culprit in culprits}))


def describe(culprits: Sequence[Culprit]) -> str:
    """All culprits in one line."""
    shown = "; ".join(map(str, culprits[:_SHOWN_CULPRITS]))
    hidden = culprits[_SHOWN_CULPRITS:]
    return shown + (f"; and {len(hidden)} more ranks" if hidden else "")
