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
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

import torch
import torch.distributed as dist

from pgm_scale.checkpoint.lock import Holder
from pgm_scale.errors import HungRankError, UserError
from pgm_scale.parallel.hangs import Beat, Culprit, Peer, Verdict, describe, find_culprits
from pgm_scale.parallel.launch import Launch
from pgm_scale.parallel.rendezvous import Member, member, read, server_address, server_name, serves, within

_SHOWN_FRAMES = 30
_SILENT_BEATS = 4  # so many beats missed in a row: the process is stopped or dead
_DEPUTIES = 8  # so many ranks come one after the other when rank 0 cannot judge, then all
_SPREADING_BEATS = 2  # after so many beats all ranks have read the verdict
_PARTING_BEATS = 5  # how long the store waits for ranks that finish later
_LATE_BEATS = 5  # and after so many they have judged by themselves
_UNWINDING_BEATS = 15  # time for a rank that was told why its collective failed to end by itself
_ABORT_S = 0.5
_ENDING_S = 120.0
_REPORT_S = 5.0  # a hung file system must not keep a rank from ending
_COMMUNICATING = ("/torch/distributed/", "/deepspeed/", "/megatron/core/", "/pgm_scale/parallel/")
_BROKEN_COLLECTIVE = (
    "gloo",
    "NCCL",
    "ncclUnhandledCudaError",
    "Connection closed by peer",
    "Connection reset by",
)
_DEAD = "is dead"
_UNKNOWN = "sends no sign of life"
_STATES = {
    "": _DEAD,
    "Z": _DEAD,
    "X": _DEAD,
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
    "D": "is stuck in the kernel (disk, network file system or GPU driver)",
}


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
    """

    def __init__(
        self, launch: Launch, store: dist.Store, timeout_s: float, folder: str | Path | None = None
    ) -> None:
        self._launch, self._store, self._timeout_s = launch, store, timeout_s
        self._folder = Path(folder) if folder is not None else None
        # At most about 256 beats a second for the store's one thread.
        self._interval_s = min(max(1.0, launch.world_size / 256), timeout_s / 5)
        self._process = Holder.here()
        self._thread = threading.get_ident()
        self._progress = (0, 0, "start")
        self._still_s = 0.0  # since the last progress
        self._unheard_s = 0.0  # since the store's last answer
        self._decided_s = 0.0  # since the verdict
        self._number = 0
        self._ended, self._failed = "", False
        self._fell_at: tuple[str, ...] = ()  # the stack of the error that ended this rank
        self._broken = False  # a collective has failed on this rank, and its main thread waits for the reason
        self._run_broken = False  # one has failed on any rank
        self._lost = False  # the connection to the store is gone
        self._first: Beat | None = None  # rank 0's last beat
        self._first_missed = 0  # how many it has missed since
        self._suspicions = 0  # exchanges in which this rank had reason to judge
        self._heard: dict[int, tuple[Beat, int]] = {}  # of each rank: the last beat, and how many were missed
        self._observations = 0
        self._verdict: Verdict | None = None
        self._explained: HungRankError | None = None
        self._reports = threading.Lock()  # taken for good by the thread that reports the verdict
        self._decided, self._stop, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._said = threading.Event()  # this rank's last words are in the store, or the store is gone
        self._all_said = threading.Event()
        self._warned = self._progress  # where this rank was when it last warned of a long phase
        self._threads: list[threading.Thread] = []

    def progress(self, what: str, step: int | None = None) -> None:
        """Call at points all along the run, the same ones on all ranks; costs less than a microsecond.

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
        self._decided.wait(6 * _SILENT_BEATS * self._interval_s)
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
                faulthandler.enable()  # a crash, and the SIGABRT of `_kill_silent`, leave a stack
            for name, target in (("watchdog", self._watch), ("watchdog-store", self._talk)):
                self._threads.append(threading.Thread(target=target, name=name, daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        explained = self.explain(error) if error is not None else None
        self._failed = not (error is None or explained or isinstance(error, HungRankError))
        if trace is not None:
            self._fell_at = _where(trace)
        self._ended = "finished" if error is None else _one_line(error)
        if self._threads:
            self._say_last_words()
        if self._verdict is not None:
            self._kill_silent(self._verdict)
        if explained is not None:
            raise explained from None

    def _say_last_words(self) -> None:
        self._wake.set()
        self._said.wait(_SILENT_BEATS * self._interval_s)
        self._linger(_PARTING_BEATS if self._ended == "finished" else _SPREADING_BEATS)
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._interval_s)  # the one at the store may be blocked

    def _linger(self, beats: int) -> None:
        """Where the store ends with this process: wait for the others, or until they have read what is in it."""
        if serves(self._launch):
            self._all_said.wait(beats * self._interval_s)

    # The thread that watches the clock.

    def _watch(self) -> None:
        seen, before_s = self._progress, time.monotonic()
        while not self._stop.wait(self._interval_s / 2):
            progress, now_s = self._progress, time.monotonic()
            lived_s = min(now_s - before_s, self._interval_s)
            self._still_s = self._still_s + lived_s if progress is seen else 0.0
            self._unheard_s += lived_s
            seen, before_s = progress, now_s
            if self._verdict is None and self._is_deaf() and self._is_stuck() and not self._ended:
                self._decide(self._blame_server())
            if self._verdict is not None:
                self._decided_s += lived_s
                if not self._broken or self._decided_s > _UNWINDING_BEATS * self._interval_s:
                    self._end(self._verdict)

    def _is_deaf(self) -> bool:
        return self._lost or self._unheard_s > _SILENT_BEATS * self._interval_s

    def _is_stuck(self, beats_early: int = 0) -> bool:
        """Whether this rank has reason to judge, or will have in so many beats."""
        early_s = beats_early * self._interval_s
        return self._broken or self._run_broken or self._still_s >= self._timeout_s - early_s

    def _blame_server(self) -> Verdict:
        lost = f"{server_name(self._launch)} at {server_address(self._launch)} does not answer"
        if self._launch.agent_attempt is not None or self._first is None:
            return self._judgement(lost, [], maker=1)
        if self._first.ended:
            culprit = Culprit(self._first, f"has left the run ({self._first.ended})")
        else:
            culprit = Culprit(self._first, _silence(self._first.process), silent=True)
        return self._judgement(describe([culprit]), [culprit], maker=1)

    def _end(self, verdict: Verdict) -> NoReturn:
        if self._reports.acquire(blocking=False):
            self._report(verdict)
        self._linger(_SPREADING_BEATS)
        self._kill_silent(verdict)
        os._exit(HungRankError.exit_code)

    def _kill_silent(self, verdict: Verdict) -> None:
        """End the processes of this machine that cannot do it, when all others have seen in what state they are."""
        here = [process for process in verdict.silent if _silence(process) not in (_DEAD, _UNKNOWN)]
        if here:
            time.sleep(_LATE_BEATS * self._interval_s)
        for number in (
            signal.SIGABRT,
            signal.SIGKILL,
        ):  # the first prints the stack, of which Python has no say
            for process in here:
                with contextlib.suppress(OSError):
                    os.kill(process.pid, number)
            time.sleep(_ABORT_S if here else 0)

    def _report(self, verdict: Verdict, with_line: bool = True) -> None:
        """Print, and write to the folder, which may be on a file system that hangs."""
        rank = self._launch.rank
        line = f"{'' if rank == 0 else f'rank {rank}: '}{verdict.line}\n" if with_line else ""
        text = (verdict.stacks if verdict.maker == rank else "") + line
        with contextlib.suppress(TimeoutError, OSError):
            within(_REPORT_S, lambda: os.write(2, text.encode()))  # `sys.stderr` has a lock
            within(_REPORT_S, lambda: self._write_stacks(verdict))

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
            self._hear_first(Beat.from_json(first))
        if verdict := self._read(store, "verdict"):
            self._decide(Verdict.from_json(verdict))
        elif beat.ended:
            self._part(store)
        elif self._is_judge():
            self._observe(store)
        else:
            self._heard.clear()

    def _read(self, store: dist.Store, key: str) -> str:
        value = read(store, key)
        self._unheard_s = 0.0
        return value

    def _hear_first(self, beat: Beat) -> None:
        moves = self._first is None or beat.number != self._first.number
        self._first, self._first_missed = beat, 0 if moves else self._first_missed + 1

    def _is_judge(self) -> bool:
        """Rank 0 as long as it lives; after it the next ones, one after the other."""
        if self._launch.rank == 0:
            return self._is_stuck(_SILENT_BEATS)  # listens to the others in good time
        vacant = self._first_missed >= _SILENT_BEATS or (self._first is not None and self._first.ended != "")
        self._suspicions = self._suspicions + 1 if vacant and self._is_stuck() else 0
        return self._suspicions >= min(self._launch.rank, _DEPUTIES)

    def _part(self, store: dist.Store) -> None:
        """Count the ranks whose last words are in the store."""
        said = store.add("ended", 0 if self._said.is_set() else 1)
        self._said.set()
        if said == self._launch.world_size:
            self._all_said.set()

    def _beat(self) -> Beat:
        self._number += 1
        step, count, phase = self._progress
        stack, waiting = _stack(self._thread)
        return Beat(
            self._launch.rank,
            self._process,
            self._number,
            (step, count),
            phase,
            self._still_s,
            waiting or self._broken,
            self._ended,
            self._failed,
            time.time(),
            self._fell_at or stack,
        )

    def _observe(self, store: dist.Store) -> None:
        """Listen to all ranks for some beats, then judge."""
        self._observations = self._observations + 1 if self._heard else 1
        for rank in range(self._launch.world_size):
            text = self._read(store, _key(rank))
            beat = Beat.from_json(text) if text else _before_the_first(rank, member(store, rank))
            last, missed = self._heard.get(rank, (beat, -1))
            self._heard[rank] = (beat, missed + 1 if beat.number == last.number else 0)
        if self._observations <= _SILENT_BEATS:
            return
        peers = [
            Peer(beat, _silence(beat.process) if missed >= _SILENT_BEATS else "")
            for beat, missed in self._heard.values()
        ]
        hidden = torch.cuda.is_initialized()
        culprits = find_culprits(peers, self._timeout_s, self._run_broken, hidden)
        if culprits is None:
            self._warn()
            return
        ours = self._judgement(describe(culprits), culprits, self._launch.rank)
        self._decide(Verdict.from_json(store.compare_set("verdict", "", ours.to_json()).decode()))

    def _warn(self) -> None:
        """Say once that this is a long phase, or a long wait for a slow rank."""
        if self._is_stuck() and self._launch.rank == 0 and self._warned is not self._progress:
            self._warned = self._progress
            text = f'no progress for {self._still_s:.0f} s in "{self._progress[2]}", but no rank hangs: going on\n'
            within(_REPORT_S, lambda: os.write(2, text.encode()))

    def _judgement(self, who: str, culprits: list[Culprit], maker: int) -> Verdict:
        who = who or "a collective failed, and no rank is dead, stopped or behind: look at the network"
        where = f"stacks are in {self._folder}; " if self._folder is not None else ""
        waited = "" if self._broken or self._run_broken else f"waited {self._still_s:.0f} s and "
        line = (
            f"{who}; the others {waited}end with exit code {HungRankError.exit_code}; "
            f"{where}run the same command to go on from the newest checkpoint"
        )
        silent = tuple(culprit.beat.process for culprit in culprits if culprit.silent)
        return Verdict(maker, line, "".join(culprit.stack() for culprit in culprits), silent)

    def _decide(self, verdict: Verdict) -> None:
        if self._verdict is None:
            self._verdict = verdict
            self._decided.set()


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _before_the_first(rank: int, who: Member | None) -> Beat:
    """In place of the first beat of a rank that joined but whose watchdog never started."""
    process = Holder(who.host if who else "unknown", "", who.pid if who else 0, "", "")
    return Beat(rank, process, 0, (0, 0), "start", 0.0, False, "", False, 0.0, ())


def _stack(thread: int) -> tuple[tuple[str, ...], bool]:
    """The stack of a thread as lines, innermost call last, and whether it waits for other ranks.

    Autograd's threads, which Python did not start, count as part of it: hooks of the backward pass run there.
    No source lines, as reading them might hang too.
    """
    others = {other.ident for other in threading.enumerate()} - {thread}
    found = sys._current_frames()
    frames = [found.pop(thread), *(frame for ident, frame in found.items() if ident not in others)]
    lines = [line for frame in frames for line in _lines(frame)]
    waiting = any(folder in frame.f_code.co_filename for frame in frames for folder in _COMMUNICATING)
    return tuple(lines), waiting


def _lines(innermost: FrameType) -> list[str]:
    lines: list[str] = []
    frame: FrameType | None = innermost
    while frame is not None and len(lines) < _SHOWN_FRAMES:
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}")
        frame = frame.f_back
    return lines[::-1]


def _where(trace: TracebackType) -> tuple[str, ...]:
    calls = list(traceback.walk_tb(trace))[-_SHOWN_FRAMES:]
    return tuple(f"{frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}" for frame, line in calls)


def _silence(process: Holder) -> str:
    """Why a process is not heard of, as far as the kernel of this machine knows."""
    if process.machine != Holder.here().machine:
        return _UNKNOWN
    return _STATES.get(_state(process), "sends no sign of life, though its process runs")


def _state(process: Holder) -> str:
    """The kernel's letter for the state of a process on this machine; "" when it is gone."""
    try:
        state, *fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return state if fields[18] == process.start_ticks else ""


def _is_broken_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN_COLLECTIVE)


def _one_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
