"""The watchdog: a run in which a rank hangs, is stopped or dies ends in time, and names the rank.

Collectives tell nobody who is missing: the ranks that came wait for a time-out. Here each rank says about every
second, in the store of the rendezvous, how far it is and where its main thread stands. A rank that gets nowhere
for `timeout_s` looks at what the others last said (`hangs.find_culprits`) and writes its verdict into the store,
where all ranks find it, say the same line, and end with `HungRankError.exit_code`. Rank 0 does so while it lives:
a thousand ranks that read from a thousand would keep the store from answering.

Two threads a rank, as an operation of the store blocks for ever when the process that serves it is stopped:
one talks to the store over its own connection, the other only watches the clock, and blames the server when the
first hears nothing. Neither takes a lock that the main thread may hold for long. Times count only while this
process runs, so that a job that was suspended as a whole goes on as if nothing had been.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch
import torch.distributed as dist

from pgm_scale.errors import HungRankError, UserError
from pgm_scale.holder import Holder
from pgm_scale.parallel.hangs import Beat, Culprit, Peer, Verdict, blamed_hosts, describe, find_culprits
from pgm_scale.parallel.launch import Launch
from pgm_scale.parallel.processes import (
    calls_of,
    can_be_ended,
    end,
    raised_at,
    silence,
    stack_of,
    thread_state,
)
from pgm_scale.parallel.rendezvous import (
    Member,
    member,
    ranks_text,
    read,
    server_address,
    server_name,
    serves,
    within,
)

_FINISHED = "finished"
_SHOWN_STACKS = 4
_SILENT_BEATS = 4  # who misses so many beats in a row is stopped or dead
_DEPUTIES = 8  # so many ranks come one after the other when rank 0 cannot judge, then all
_LATE_BEATS = 5  # after so many, ranks that cannot reach the store have judged by themselves
_UNWINDING_BEATS = 15  # time for a rank that was told why its collective failed to end by itself
_ENDING_S = 120.0
_REPORT_S = 5.0  # a hung file system must not keep a rank from ending
_BROKEN_COLLECTIVE = (
    "gloo",
    "NCCL",
    "ncclUnhandledCudaError",
    "Connection closed by peer",
    "Connection reset by",
)


class Watchdog:
    """Watches one rank, and with the others' watchdogs all of them, from `__enter__` to `__exit__`.

    Enter it right after `rendezvous.join`, before the process group is made, and leave it last. It does nothing
    in a run of one process.

    Args:
        launch: as given to `rendezvous.join`.
        store: what that returned.
        timeout_s: end the run when no rank has made progress for as long. A collective's own time-out should
            be several times longer, as it does not know a slow rank from a hung one.
        folder: `<run>/hangs`: each rank adds its stacks to a file there when the run ends so.
        on_hang: called on the rank that judges, in a thread; it has 5 s.
    """

    def __init__(
        self,
        launch: Launch,
        store: dist.Store,
        timeout_s: float,
        folder: str | Path | None = None,
        on_hang: Callable[[Verdict], None] | None = None,
    ) -> None:
        self._launch, self._store, self._timeout_s = launch, store, timeout_s
        self._folder = Path(folder) if folder is not None else None
        self._on_hang = on_hang
        # At most about 256 beats a second for the store's one thread.
        self._interval_s = min(max(1.0, launch.world_size / 256), timeout_s / 5)
        self._silent_s = _SILENT_BEATS * self._interval_s
        self._process = Holder.here()
        self._thread, self._thread_state = threading.get_ident(), thread_state()
        self._progress = self._warned = (0, 0, "start")  # now, and when a long phase was last warned of
        self._number = 0
        self._ended, self._failed = "", False
        self._raised_at: tuple[str, ...] = ()
        self._broken = False  # a collective has failed on this rank, and its main thread waits for the reason
        self._run_broken = False  # one has failed on any rank
        self._lost = False  # the connection to the store is gone
        # Moments of this process's own clock, which stands still while the process is suspended.
        self._lived_s = self._moved_s = self._answered_s = self._decided_s = self._listening_s = 0.0
        self._first: tuple[Beat, float] | None = None  # rank 0's last beat, and when it was new
        self._heard: dict[int, tuple[Beat, float]] = {}  # the same of each rank, while this one judges
        self._vacancy = 0  # exchanges for which there has been no rank 0 to judge, but reason to
        self._verdict: Verdict | None = None
        self._explained: HungRankError | None = None
        self._reports = threading.Lock()  # taken for good by the thread that reports the verdict
        self._decided, self._stop, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._said = threading.Event()  # this rank's last words are in the store, or the store is gone
        self._all_said = threading.Event()
        self._threads: list[threading.Thread] = []

    def progress(self, what: str, step: int | None = None) -> None:
        """Call at points all along the run, the same ones on all ranks; costs about a microsecond.

        Args:
            what: what begins now, as a person would say it.
            step: the training step that begins, if one does.
        """
        if step is None:
            step, count, _ = self._progress
            self._progress = (step, count + 1, what)
        else:
            self._progress = (step, 0, what)

    def explain(self, error: BaseException) -> HungRankError | None:
        """Who is to blame for a collective's `error`; takes some seconds. None: it is not a collective's error.

        `__exit__` does this for errors that reach it.
        """
        if self._launch.world_size == 1 or not _is_broken_collective(error):
            return None
        if self._explained is None:
            self._explained = self._explanation(error)
        return self._explained

    def _explanation(self, error: BaseException) -> HungRankError:
        self._broken = True
        self._wake.set()
        self._decided.wait(6 * self._silent_s)
        line = "a collective failed, and no rank to blame was found"
        if self._verdict is not None:
            line = self._verdict.line
            if not self._reports.acquire(blocking=False):
                time.sleep(_ENDING_S)  # the other thread is ending this process
            self._report(self._verdict, with_line=False)
        return HungRankError(f"{line} (rank {self._launch.rank} saw: {_one_line(error)})")

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        if self._launch.world_size > 1:
            if not faulthandler.is_enabled():
                faulthandler.enable()  # a crash, and the SIGABRT of `processes.end`, leave a stack
            for name, target in (("watchdog", self._watch), ("watchdog-store", self._talk)):
                self._threads.append(threading.Thread(target=target, name=name, daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        explained = self.explain(error) if error is not None else None
        if trace is not None:
            self._raised_at = raised_at(trace)
        self._failed = not (error is None or explained or isinstance(error, HungRankError))
        self._ended = _FINISHED if error is None else _one_line(error)
        if self._threads:
            self._say_last_words()
        if self._verdict is not None:
            self._end_silent(self._verdict)
        if explained is not None:
            raise explained from None

    def _say_last_words(self) -> None:
        self._wake.set()
        self._said.wait(self._silent_s)
        self._linger(self._timeout_s + 2 * self._silent_s if self._ended == _FINISHED else self._spread_s)
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._interval_s)  # the one at the store may be blocked

    def _linger(self, seconds: float) -> None:
        """Where the store ends with this process: wait until the others have ended too."""
        if serves(self._launch):
            self._all_said.wait(seconds)

    @property
    def _spread_s(self) -> float:
        """After so long all ranks have read the verdict."""
        return 2 * self._interval_s

    @property
    def _still_s(self) -> float:
        return self._lived_s - self._moved_s

    # The thread that watches the clock.

    def _watch(self) -> None:
        seen, before_s = self._progress, time.monotonic()
        while not self._stop.wait(self._interval_s / 2):
            progress, now_s = self._progress, time.monotonic()
            self._lived_s += min(now_s - before_s, self._interval_s)
            if progress is not seen:
                self._moved_s = self._lived_s
            seen, before_s = progress, now_s
            if self._verdict is None and self._is_deaf() and self._is_stuck() and not self._ended:
                self._decide(self._blame_server())
            if self._verdict is not None and self._must_end():
                self._end(self._verdict)

    def _is_deaf(self) -> bool:
        return self._lost or self._lived_s - self._answered_s > self._silent_s

    def _is_stuck(self, early_s: float = 0.0) -> bool:
        """Whether this rank has reason to judge, or will have so soon."""
        return self._broken or self._run_broken or self._still_s >= self._timeout_s - early_s

    def _must_end(self) -> bool:
        """A main thread that knows the verdict gets some time to end by itself."""
        return not self._broken or self._lived_s - self._decided_s > _UNWINDING_BEATS * self._interval_s

    def _blame_server(self) -> Verdict:
        if self._launch.agent_attempt is not None or self._first is None:
            address = server_address(self._launch)
            return self._judgement(f"{server_name(self._launch)} at {address} does not answer", [], maker=1)
        beat, _ = self._first
        if beat.ended:
            culprit = Culprit(beat, f"has left the run ({beat.ended})")
        else:
            culprit = Culprit(beat, silence(beat.process), silent=True)
        return self._judgement(describe([culprit]), [culprit], maker=1)

    def _end(self, verdict: Verdict) -> NoReturn:
        if self._reports.acquire(blocking=False):
            self._report(verdict)
        self._linger(self._spread_s)
        self._end_silent(verdict)
        os._exit(HungRankError.exit_code)

    def _end_silent(self, verdict: Verdict) -> None:
        """End the processes of this machine that cannot do it, when all others have seen in what state they are."""
        if any(map(can_be_ended, verdict.silent)):
            time.sleep(_LATE_BEATS * self._interval_s)
            end(verdict.silent)

    def _report(self, verdict: Verdict, with_line: bool = True) -> None:
        """Print, and write to the folder, which may be on a file system that hangs."""
        rank = self._launch.rank
        line = f"{'' if rank == 0 else f'rank {rank}: '}{verdict.line}\n" if with_line else ""
        text = (verdict.stacks if verdict.maker == rank else "") + line
        with contextlib.suppress(TimeoutError, OSError):
            within(_REPORT_S, lambda: os.write(2, text.encode()))  # `sys.stderr` has a lock
            within(_REPORT_S, lambda: self._write_stacks(verdict))
        if self._on_hang is not None and verdict.maker == rank:
            tell = partial(self._on_hang, verdict)
            with contextlib.suppress(TimeoutError, OSError):
                within(_REPORT_S, tell)

    def _write_stacks(self, verdict: Verdict) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / f"rank-{self._launch.rank}.txt", "a") as file:
            file.write(f"{time.strftime('%F %T')} {verdict.line}\n{verdict.stacks}this rank's own threads:\n")
            file.flush()
            faulthandler.dump_traceback(file)

    # The thread that talks to the store.

    def _talk(self) -> None:
        try:
            store = self._store.clone()  # a connection of its own
            while not self._stop.is_set():
                self._exchange(store)
                self._wake.wait(self._interval_s / 10 if self._said.is_set() else self._interval_s)
                self._wake.clear()
        except RuntimeError:  # the connection broke: rank 0 is dead, or has finished before this rank
            self._lost = True
            self._said.set()

    def _exchange(self, store: dist.Store) -> None:
        beat = self._beat()
        store.set(_key(beat.rank), beat.to_json())
        if self._broken:
            store.set("broken", "yes")
        if not self._run_broken and self._read(store, "broken"):
            self._run_broken = True
            self._heard.clear()  # listen anew: whoever broke it may have spoken just before
        if first := self._read(store, _key(0)):
            self._first = self._newer(self._first, Beat.from_json(first))
        if beat.ended:
            self._part(store)
        if verdict := self._read(store, "verdict"):
            self._decide(Verdict.from_json(verdict))
        elif self._is_judge():
            self._observe(store)
        else:
            self._heard.clear()

    def _read(self, store: dist.Store, key: str) -> str:
        value = read(store, key)
        self._answered_s = self._lived_s
        return value

    def _newer(self, last: tuple[Beat, float] | None, beat: Beat) -> tuple[Beat, float]:
        """A beat with the time since when it is known."""
        return (beat, self._lived_s if last is None or beat.number != last[0].number else last[1])

    def _is_silent(self, heard: tuple[Beat, float]) -> bool:
        return self._lived_s - heard[1] >= self._silent_s

    def _is_judge(self) -> bool:
        """Rank 0 as long as it lives, also when it has finished; then the next ones, one after the other."""
        if self._ended not in ("", _FINISHED):
            return False
        if self._launch.rank == 0:
            return self._is_stuck(early_s=self._silent_s)  # listens to the others in good time
        vacant = self._first is not None and (self._first[0].ended != "" or self._is_silent(self._first))
        self._vacancy = self._vacancy + 1 if vacant and self._is_stuck() else 0
        return self._vacancy >= min(self._launch.rank, _DEPUTIES)

    def _part(self, store: dist.Store) -> None:
        """Count the ranks whose last words are in the store."""
        said = store.add("ended", 0 if self._said.is_set() else 1)
        self._said.set()
        if said == self._launch.world_size:
            self._all_said.set()

    def _beat(self) -> Beat:
        self._number += 1
        step, count, phase = self._progress
        stack, waits = self._stack()
        return Beat(
            self._launch.rank,
            self._process,
            self._number,
            (step, count),
            phase,
            self._still_s,
            waits or self._broken,
            self._ended,
            self._failed,
            self._raised_at or stack,
        )

    def _stack(self) -> tuple[tuple[str, ...], bool]:
        """Of all threads only once the run seems to hang (`processes.calls_of` says why)."""
        seems_well = not (self._broken or self._run_broken) and self._still_s < self._timeout_s / 4
        if seems_well and self._thread_state is not None:
            return calls_of(self._thread_state)
        return stack_of(self._thread)

    def _observe(self, store: dist.Store) -> None:
        """Listen to all ranks for some beats, then judge."""
        if not self._heard:
            self._listening_s = self._lived_s
        for rank in range(self._launch.world_size):
            text = self._read(store, _key(rank))
            beat = Beat.from_json(text) if text else _before_the_first(rank, member(store, rank))
            self._heard[rank] = self._newer(self._heard.get(rank), beat)
        if self._lived_s - self._listening_s >= self._silent_s:
            self._judge(store)

    def _judge(self, store: dist.Store) -> None:
        peers = [
            Peer(heard[0], silence(heard[0].process) if self._is_silent(heard) else "")
            for heard in self._heard.values()
        ]
        hidden = torch.cuda.is_initialized()
        culprits = find_culprits(peers, self._timeout_s, self._run_broken, hidden)
        if culprits is None:
            self._warn([peer.beat.rank for peer in peers if peer.beat.still_s < self._timeout_s])
            return
        ours = self._judgement(describe(culprits), culprits, self._launch.rank)
        self._decide(Verdict.from_json(store.compare_set("verdict", "", ours.to_json()).decode()))

    def _warn(self, moving: list[int]) -> None:
        """Say once that this is a long wait for slow ranks, or a long phase."""
        late = self._is_stuck(early_s=-self._silent_s)  # a verdict is not on its way
        if not late or self._launch.rank != 0 or self._warned is self._progress:
            return
        self._warned = self._progress
        reason = "no rank waits for another"
        if moving:
            reason = f"{ranks_text(moving)} make{'s' if len(moving) == 1 else ''} progress"
        text = f'no progress for {self._still_s:.0f} s in "{self._warned[2]}"; going on, as {reason}\n'
        with contextlib.suppress(TimeoutError, OSError):
            within(_REPORT_S, lambda: os.write(2, text.encode()))

    def _judgement(self, who: str, culprits: list[Culprit], maker: int) -> Verdict:
        who = who or "a collective failed, and no rank is dead, stopped or behind: look at the network"
        where = f"stacks are in {self._folder}; " if self._folder is not None else ""
        waited = "" if self._broken or self._run_broken else f"waited {self._still_s:.0f} s and "
        line = (
            f"{who}; the others {waited}end with exit code {HungRankError.exit_code}; "
            f"{where}run the same command to go on from the newest checkpoint"
        )
        stacks = "".join(culprit.stack() for culprit in culprits[:_SHOWN_STACKS])
        silent = tuple(culprit.beat.process for culprit in culprits if culprit.silent)
        hosts = blamed_hosts(culprits, self._launch.world_size)
        return Verdict(maker, line, stacks, silent, hosts)

    def _decide(self, verdict: Verdict) -> None:
        if self._verdict is None:
            self._decided_s = self._lived_s
            self._verdict = verdict
            self._decided.set()


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _before_the_first(rank: int, who: Member | None) -> Beat:
    """In place of the first beat of a rank that joined but whose watchdog never started."""
    process = Holder(who.host if who else "unknown", "", who.pid if who else 0, "", "")
    return Beat(rank, process, 0, (0, 0), "start", 0.0, False, "", False, ())


def _is_broken_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN_COLLECTIVE)


def _one_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
