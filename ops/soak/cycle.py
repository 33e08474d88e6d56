"""One run, killed and started again until it has finished; each session is compared with the run uninterrupted."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.soak.board import Place
from ops.soak.checks import (
    Record,
    checkpoint_problems,
    committed,
    final_problems,
    largest_gap,
    leftover_problems,
    read_records,
    record_problems,
)
from ops.soak.runs import Layout, TrainedRun
from ops.soak.sessions import Outcome, Plan, Sessions
from pgm_scale.checkpoint.step_folders import StepFolders
from pgm_scale.errors import HungRankError, Preempted, UserError
from pgm_scale.watching.heartbeat import read_heartbeat

_KILLED, _TERMINATED = -9, -15
_START_OPERATIONS = 25
_EARLY_SHARE = 0.15
_LEAST_STEPS = (
    15  # as if so many were left: else the last sessions would all be killed before their first step
)


@dataclass
class Event:
    """A session, what was done to it, and what was found afterwards; `problems` must stay empty."""

    layout: Layout
    asynchronous: bool
    exact: bool
    plan: Plan
    outcome: Outcome
    newest_before: int
    newest_after: int
    phase: str
    save_under_way: bool
    problems: list[str]
    records: int = 0

    @property
    def was_killed(self) -> bool:
        return self.plan.what == "kill" and self.outcome.hit

    @property
    def finished(self) -> bool:
        return set(self.outcome.exit_codes) == {0}

    def to_json(self) -> dict[str, Any]:
        outcome = dataclasses.asdict(self.outcome)
        if not self.problems:
            del outcome["output"]
        return {
            "layout": str(self.layout),
            "asynchronous": self.asynchronous,
            "exact": self.exact,
            "plan": dataclasses.asdict(self.plan),
            "newest_before": self.newest_before,
            "newest_after": self.newest_after,
            "phase": self.phase,
            "save_under_way": self.save_under_way,
            "problems": self.problems,
            "outcome": outcome,
        }


@dataclass(frozen=True)
class Pace:
    """How a session of a layout goes when nothing happens to it."""

    start_s: float
    step_s: float
    step_operations: float = 8.0

    @staticmethod
    def guess(ranks: int) -> Pace:
        return Pace(0.1 + 0.3 * ranks, 0.02 * ranks * ranks)


class Cycle:
    """A run in `folder/run`, and the same uninterrupted in `folder/reference`.

    Raises:
        RuntimeError: the uninterrupted run did not finish.
    """

    def __init__(
        self, sessions: Sessions, run: TrainedRun, layout: Layout, data: Path, folder: Path, seed: int
    ) -> None:
        folder.mkdir(parents=True)
        self.run, self.layout, self.folder = run, layout, folder
        self.choice = random.Random(seed)
        self.exact, self.largest_gap = True, 0.0
        self._may_miss: set[int] = set()
        self._sessions = sessions
        self._config = run.write(data, folder / "config.yaml")
        self._paces: dict[int, Pace] = {}
        self._run_folder, self.reference = folder / "run", folder / "reference"
        outcome = self._start(self.reference, layout, False, Plan())
        if set(outcome.exit_codes) != {0}:
            raise RuntimeError(f"the uninterrupted run of {folder} failed: {outcome.output}")
        self._expected = read_records(self.reference, killed=False)
        self._learn(layout, outcome, 0)

    @property
    def newest(self) -> int:
        """The newest step that is committed."""
        return max(committed(self._run_folder), default=0)

    def restart(self) -> None:
        """The same run again, from nothing."""
        shutil.rmtree(self._run_folder, ignore_errors=True)
        self.exact = True
        self._may_miss.clear()

    def plan_at(self, what: str, layout: Layout, rank: int | None = None, by_operation: bool = False) -> Plan:
        """A moment drawn uniformly from the life that a session would have from here, or from its operations."""
        pace = self._paces.get(layout.ranks) or Pace.guess(layout.ranks)
        steps = max(self.run.steps - self.newest, _LEAST_STEPS)
        if by_operation:
            most = _START_OPERATIONS + int(steps * pace.step_operations / (1 if rank in (None, 0) else 6))
            return Plan("kill", rank, at_operation=self.choice.randrange(most))
        # Ranks wait long for one that is gone before it has joined them: that is not for every session.
        first_s = 0.0 if rank is None or self.choice.random() < _EARLY_SHARE else pace.start_s
        after_s = self.choice.uniform(first_s, pace.start_s + steps * pace.step_s)
        return Plan(what, rank, after_s, grace_s=self.choice.uniform(0.0, 0.5))  # type: ignore[arg-type]

    def plan_in(self, operation: str) -> Plan:
        """A kill in one of the saves that are left, at the operation whose description begins so."""
        saves = (self.run.steps - self.newest) // self.run.save_interval_steps
        return Plan("kill", operation=operation, at_operation=self.choice.randrange(max(1, saves)))

    def session(self, plan: Plan, layout: Layout | None = None, asynchronous: bool = True) -> Event:
        """Start the run again, do to it what is planned, and look at what it has left."""
        layout = layout or self.layout
        self.exact = self.exact and layout == self.layout
        before = self.newest
        outcome = self._start(self._run_folder, layout, asynchronous, plan)
        saving = any(StepFolders(self._run_folder).folder.glob(".step_*.saving"))
        event = Event(
            layout, asynchronous, self.exact, plan, outcome, before, self.newest, "", saving, problems=[]
        )
        if plan.what == "terminate and kill" and self.newest % self.run.validation_interval_steps == 0:
            self._may_miss.add(self.newest)  # saved before its validation, which its record waits for
        event.phase = self._phase(outcome.place)
        event.problems += self._problems(event)
        if event.finished:
            self._learn(layout, outcome, before)
        return event

    def _start(self, folder: Path, layout: Layout, asynchronous: bool, plan: Plan) -> Outcome:
        arguments = self.run.arguments(self._config, folder, layout, asynchronous)
        return self._sessions.run(arguments, layout.ranks, plan)

    def _learn(self, layout: Layout, outcome: Outcome, first_step: int) -> None:
        steps = self.run.steps - first_step
        if outcome.start_s is not None and steps >= self.run.steps // 4:
            step_s = (outcome.life_s - outcome.start_s) / steps
            operations = max(1.0, (outcome.operations[0] - _START_OPERATIONS) / steps)
            self._paces[layout.ranks] = Pace(outcome.start_s, step_s, operations)

    def _problems(self, event: Event) -> list[str]:
        outcome, found = event.outcome, []
        found += [f"a process is left: {command}" for command in outcome.leftovers]
        if outcome.hung:
            found.append("the session did not end")
        found += exit_problems(event)
        if outcome.first_step is not None and outcome.first_step < event.newest_before:
            found.append(
                f"resumed from step {outcome.first_step}, though step {event.newest_before} was committed"
            )
        if event.newest_after < event.newest_before:
            found.append(f"step {event.newest_before} was committed and is gone")
        if outcome.preempted_at is not None and outcome.preempted_at != event.newest_after:
            found.append(
                f"says that step {outcome.preempted_at} is saved, and the newest is {event.newest_after}"
            )
        found += checkpoint_problems(self._run_folder)
        records: Sequence[Record] = read_records(self._run_folder, killed=not event.finished)
        event.records = len(records)
        found += record_problems(records, self._expected, self.exact, self._may_miss)
        self.largest_gap = max(self.largest_gap, largest_gap(records, self._expected))
        if event.finished:
            found += self._final_problems(event, records)
        return found

    def _final_problems(self, event: Event, records: Sequence[Record]) -> list[str]:
        found = []
        has_saved = event.newest_after > event.newest_before
        if event.newest_after != self.run.steps or records[-1]["step"] != self.run.steps:
            found.append(f"finished at step {event.newest_after} with records to {records[-1:]}")
        else:
            found += final_problems(self._run_folder, self.reference, self.run.steps, self.exact)
        return [*found, *leftover_problems(self._run_folder, self.run.keep_last, has_saved)]

    def _phase(self, place: Place | None) -> str:
        if place is None:
            return "none"
        state = ""
        try:
            beat = read_heartbeat(self._run_folder)
            state = beat.state if beat is not None else ""
        except ValueError:
            pass
        return phase_of(place, state)


def phase_of(place: Place, state: str) -> str:
    """What a rank was doing, in one of a few words; `state` is that of the heartbeat."""
    operation, _, name = place.operation.partition(" ")
    if name.startswith(("step_", ".step_")) and not name.endswith(".saving"):
        return "purge"
    if name.startswith(("LATEST", ".LATEST")):
        return "commit"
    if name in ("state.json", "manifest.json", "checkpoints") or name.startswith(".step_"):
        return "save" if operation == "mkdir" else "commit"
    if name.startswith("rank_"):
        return "save" if operation in ("fsync", "ftruncate") else "purge"
    if not place.progress or place.progress.startswith("drawing"):
        return "start"
    if state == "validating" or place.progress == "evaluation":
        return "validation"
    if place.progress.startswith(("writing", "copying", "waiting for the checkpoint")) or state == "saving":
        return "save"
    if place.progress.startswith(("checking", "reading rank_")):
        return "resume"
    if place.progress.startswith("reading the data"):
        return "data"
    return "step" if "micro-batch" in place.progress or place.progress.startswith("update") else "other"


def exit_problems(event: Event) -> list[str]:
    """Exit codes that do not follow from what was done."""
    plan, codes = event.plan, event.outcome.exit_codes
    if not event.outcome.hit:
        allowed = {0}
    elif plan.what == "terminate":
        # 0: it was at its last step. A signal before the command has begun ends the rank as any program.
        allowed = {0, Preempted.exit_code, _TERMINATED, HungRankError.exit_code, UserError.exit_code}
        if _TERMINATED not in codes:
            allowed = {0} if 0 in codes else {Preempted.exit_code}
    elif plan.rank is None and plan.what == "kill" and len(codes) == 1:
        allowed = {_KILLED}
    else:
        allowed = {0, _KILLED, _TERMINATED, Preempted.exit_code, HungRankError.exit_code, UserError.exit_code}
    wrong = [code for code in codes if code not in allowed]
    return [f"exit codes {codes} after {plan.what}"] if wrong else []
