"""Sessions of a run: real ranks, each a process, that are left alone, killed or told to stop.

They are forked from a server, see there: a session costs about a second.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from ops.soak.board import Board, Place
from ops.soak.rank import rank_main
from ops.soak.server import ForkServer
from pgm_scale.parallel.launch import free_port

_POLL_S = 0.01
_LEFTOVER_S = 5.0  # a helper that sees its rank dead may need to end
_RESUMED = re.compile(r"resumed from the checkpoint of step (\d+)|nothing to do: step (\d+) of")
_PREEMPTED = re.compile(r"stopped by a signal after step (\d+), which is saved")
_TRAINED = re.compile(r"^step \d+/\d+ ", re.MULTILINE)


@dataclass(frozen=True)
class Plan:
    """What is to happen to a session.

    Attributes:
        what: left alone, SIGKILL, SIGTERM, or SIGTERM and SIGKILL `grace_s` later, as an impatient scheduler does.
        rank: whom it hits; None: all at once (SIGTERM always hits one, the others must follow).
        after_s: when, since the start.
        at_operation: instead, when that rank (0 if all) has changed files so often and is about to do so again;
            of a kill only. Counted are the operations whose description, as in `Place`, begins with `operation`.
    """

    what: Literal["nothing", "kill", "terminate", "terminate and kill"] = "nothing"
    rank: int | None = None
    after_s: float = 0.0
    at_operation: int | None = None
    operation: str = ""
    grace_s: float = 0.0


@dataclass
class Outcome:
    """What became of a session.

    Attributes:
        exit_codes: of the ranks, -9 for one that was killed.
        hit: whether the plan's signal found the session alive.
        place: where the rank was that was hit (rank 0 if all).
        first_step: what it resumed from, as it says itself; 0: it began anew; None: it did not come so far.
        preempted_at: the step that it says it has saved after a signal.
        leftovers: processes that it has left and that did not end soon, which are ended then.
        hung: it did not end in time, and was ended.
    """

    exit_codes: list[int]
    life_s: float
    start_s: float | None
    hit: bool
    place: Place | None
    operations: list[int]
    first_step: int | None
    preempted_at: int | None
    leftovers: list[str] = field(default_factory=list)
    hung: bool = False
    output: str = ""


class Sessions:
    """Starts sessions, one at a time; their logs are in `folder`, which is also their place for temporary files."""

    def __init__(self, folder: Path, patience_s: float = 180.0) -> None:
        self.folder, self._patience_s = folder, patience_s
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.pids: set[int] = set()
        self.server = ForkServer()

    def close(self) -> None:
        self.server.__exit__(None, None, None)

    def step(self) -> int | None:
        """The step that the session under way has begun; None before the first."""
        found = re.search(r"step (\d+)", Board(self.folder / "board-rank-0").place().progress)
        return int(found[1]) if found else None

    def run(
        self,
        arguments: Sequence[str],
        ranks: int,
        plan: Plan | None = None,
        while_running: Callable[[Sequence[int]], None] = lambda pids: None,
    ) -> Outcome:
        """A session of `pgm-scale` with the arguments on so many ranks, and what the plan does to it.

        `while_running` is called with the ranks' process ids all the time, and must return soon.
        """
        plan = plan or Plan()
        self.count += 1
        session = _Session(self, arguments, ranks, plan)
        session.start()
        try:
            session.watch(self._patience_s, while_running)
        finally:
            session.end()
        return session.outcome()


class _Session:
    """One session, from its start to its end."""

    def __init__(self, sessions: Sessions, arguments: Sequence[str], ranks: int, plan: Plan) -> None:
        self._plan, self._ranks = plan, ranks
        folder = sessions.folder
        self._logs = [folder / f"session-rank-{rank}.log" for rank in range(ranks)]
        board_paths = [folder / f"board-rank-{rank}" for rank in range(ranks)]
        for path in [*self._logs, *board_paths]:
            path.unlink(missing_ok=True)
        self._boards = [Board(path) for path in board_paths]
        self._pids: list[int] = []
        self._arguments, self._board_paths = arguments, board_paths
        self._sessions = sessions
        self._start_s: float | None = None
        self._life_s = 0.0
        self._hit = self._hung = False
        self._place: Place | None = None
        self._leftovers: list[str] = []

    def start(self) -> None:
        plan, port = self._plan, free_port()
        self._began_s = time.monotonic()
        for rank in range(self._ranks):
            environment = {"TMPDIR": str(self._sessions.temporary)}
            if self._ranks > 1:
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(self._ranks), "LOCAL_RANK": str(rank)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            dies_at = None
            if plan.at_operation is not None and rank == (plan.rank or 0):
                dies_at = (plan.operation, plan.at_operation)
            self._pids.append(
                self._sessions.server.fork(
                    rank_main,
                    self._arguments,
                    environment,
                    self._logs[rank],
                    self._board_paths[rank],
                    dies_at,
                )
            )
        self._sessions.pids.update(self._pids)

    def _exit_code(self, rank: int) -> int | None:
        return self._sessions.server.exit_code(self._pids[rank])

    @property
    def _lives(self) -> bool:
        return any(self._exit_code(rank) is None for rank in range(self._ranks))

    def watch(self, patience_s: float, while_running: Callable[[Sequence[int]], None]) -> None:
        """Until all ranks have ended; those that are still there `patience_s` after the hit are hung."""
        plan, kill_s = self._plan, None
        struck_s = None if plan.what == "nothing" else plan.after_s
        deadline_s = None
        while self._lives:
            time.sleep(_POLL_S)
            self._life_s = time.monotonic() - self._began_s
            if self._start_s is None and self._boards[0].place().progress.startswith("reading the data"):
                self._start_s = self._life_s
            if plan.what == "kill" and plan.at_operation is not None:
                if not self._hit and self._exit_code(plan.rank or 0) is not None:
                    self._strike(signal.SIGKILL)
                    deadline_s = self._life_s + patience_s
            elif struck_s is not None and self._life_s >= struck_s:
                self._strike(signal.SIGKILL if plan.what == "kill" else signal.SIGTERM)
                struck_s, deadline_s = None, self._life_s + patience_s
                if plan.what == "terminate and kill" and self._hit:
                    kill_s = self._life_s + plan.grace_s
            if kill_s is not None and self._life_s >= kill_s:
                self._signal(signal.SIGKILL, range(self._ranks))
                kill_s = None
            if deadline_s is not None and self._life_s > deadline_s:
                self._hung = True
                return
            while_running(self._pids)
        if plan.at_operation is not None and not self._hit:
            self._strike(signal.SIGKILL)  # for what it notes: it may have died, alone, just before the end

    def _strike(self, number: signal.Signals) -> None:
        """Who is hit by a signal at this moment; where it was is read when it stands still."""
        rank = self._plan.rank
        alone = number == signal.SIGTERM or rank is not None
        targets = [rank or 0] if alone else range(self._ranks)
        by_itself = self._plan.at_operation is not None and self._exit_code(rank or 0) == -9
        self._hit = self._signal(number, targets) or by_itself
        self._place = self._boards[rank or 0].place()

    def _signal(self, number: signal.Signals, ranks: Sequence[int]) -> bool:
        hit = False
        for rank in ranks:
            if self._exit_code(rank) is None:
                os.kill(self._pids[rank], number)
                hit = True
        return hit

    def end(self) -> None:
        """No process of the session is left afterwards."""
        self._signal(signal.SIGKILL, range(self._ranks))
        while self._lives:
            time.sleep(_POLL_S)
        deadline_s = time.monotonic() + _LEFTOVER_S
        while (left := self._left()) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        for process in left:
            with contextlib.suppress(psutil.Error):
                self._leftovers.append(f"{process.name()}: {' '.join(process.cmdline())[:200]}")
                process.kill()

    def _left(self) -> list[psutil.Process]:
        """What lives of the ranks' sessions: whom they have started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) in self._pids and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def outcome(self) -> Outcome:
        text = self._logs[0].read_text(errors="replace") if self._logs[0].exists() else ""
        resumed, preempted = _RESUMED.search(text), _PREEMPTED.search(text)
        first_step = int(resumed[1] or resumed[2]) if resumed else 0 if _TRAINED.search(text) else None
        exit_codes = [self._exit_code(rank) or 0 for rank in range(self._ranks)]
        if self._plan.what == "kill":  # a process that has just ended takes a signal too
            self._hit = self._hit and -signal.SIGKILL in exit_codes
        return Outcome(
            exit_codes=exit_codes,
            life_s=self._life_s,
            start_s=self._start_s,
            hit=self._hit,
            place=self._place,
            operations=[board.place().operations for board in self._boards],
            first_step=first_step,
            preempted_at=int(preempted[1]) if preempted else None,
            leftovers=self._leftovers,
            hung=self._hung,
            output="".join(
                f"--- rank {rank}\n{log.read_text(errors='replace')[-3000:]}"
                for rank, log in enumerate(self._logs)
                if log.exists()
            ),
        )
