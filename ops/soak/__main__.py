"""`python -m ops.soak`: runs are killed, stopped, moved to other layouts and started again, for as long as asked.

Each run is compared with itself uninterrupted. Between the runs are long sessions, whose memory and open files are
watched. Writes result.md, soak.json, soak.png and events.jsonl, one line a session with its seed; exits with 1 when
anything was not as it has to be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pgm_scale.files import finite

if TYPE_CHECKING:
    from ops.soak.cycle import Cycle, Event
    from ops.soak.runs import Layout
    from ops.soak.sessions import Plan

_LONG_SHARE = 0.3  # of the time, for long sessions
_LONG_S = 600.0
_MOST_SESSIONS = 60  # of a run; then it is let go
_MOST_TEMPORARY_FILES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # before torch is imported
    options.out.mkdir(parents=True, exist_ok=True)
    soaking = Soaking(options.out.resolve(), options.seed, options.ranks_up_to, 60 * options.minutes)
    try:
        soaking.run()
    finally:
        soaking.close()
    print((options.out / "result.md").read_text())
    return 1 if soaking.soak.violations else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ops.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("build/soak"))
    parser.add_argument("--ranks-up-to", type=int, choices=(1, 2, 4), default=4)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next ones count on")
    return parser


class Soaking:
    """The soak in the folder `out`."""

    def __init__(self, out: Path, seed: int, most_ranks: int, budget_s: float) -> None:
        from ops.parity_runs import write_data
        from ops.soak.report import Soak
        from ops.soak.sessions import Sessions

        self.out, self.most_ranks, self.budget_s = out, most_ranks, budget_s
        self.soak = Soak(_commit(), seed)
        self._long_s = 0.0
        self._work = out / "work"
        shutil.rmtree(self._work, ignore_errors=True)
        (out / "events.jsonl").unlink(missing_ok=True)
        self._data = write_data(self._work / "data")
        self._sessions = Sessions(self._work / "sessions")
        self._begin_s = time.monotonic()

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._begin_s

    def run(self) -> None:
        from ops.soak.report import write

        number = 0
        long_s = min(_LONG_S, _LONG_SHARE * self.budget_s)
        while self._elapsed_s < self.budget_s:
            self._cycle(self.soak.seed + number)
            number += 1
            if self._long_s + long_s <= _LONG_SHARE * max(self._elapsed_s, self.budget_s / 2):
                self._long(self.soak.seed + number, long_s)
            self.soak.minutes = self._elapsed_s / 60
            write(self.soak, self.out)

    def close(self) -> None:
        self._sessions.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def _cycle(self, seed: int) -> None:
        """One run to its end; every other one keeps its layout."""
        from ops.soak.cycle import Cycle
        from ops.soak.runs import STEPS, Layout, TrainedRun, random_layout

        choice = random.Random(f"cycle {seed}")
        moves = seed % 2 == 0
        ranks = choice.choice([r for r in (1, 1, 1, 2, 2, 4) if r <= self.most_ranks])
        start = Layout(micro_batch_sequences=16) if moves else random_layout(choice, ranks)
        run = TrainedRun(
            workload=choice.choice(("PGM", "MDLM")),
            seed=seed,
            steps=STEPS if moves else 2 * STEPS,
            save_interval_steps=choice.choice((2, 3)),
            keep_last=choice.choice((1, 2, 3)),
            dropout=0.0 if moves else choice.choice((0.0, 0.1)),
            learning_rate=1e-3 if moves else 3e-3,
        )
        folder = self._work / f"cycle-{seed}"
        cycle = Cycle(self._sessions, run, start, self._data, folder, seed)
        problems, layout = [], start
        for session in range(_MOST_SESSIONS):
            if moves and choice.random() < 0.6:
                layout = random_layout(choice, choice.choice([r for r in (1, 2, 4) if r <= self.most_ranks]))
                self.soak.moves += 1
            plan = _plan(cycle, layout, choice, session)
            event = cycle.session(plan, layout, asynchronous=choice.random() < 0.6)
            self._note(seed, session, event)
            problems += event.problems
            if event.problems or event.finished:
                self.soak.most_restarts = max(self.soak.most_restarts, session + 1)
                break
        self.soak.cycles += 1
        self.soak.exact_cycles += cycle.exact
        self.soak.largest_gap = max(self.soak.largest_gap, cycle.largest_gap)
        self._after(seed, folder, problems)

    def _note(self, seed: int, session: int, event: Event) -> None:
        soak, hit = self.soak, event.outcome.hit
        soak.sessions += 1
        soak.layouts[str(event.layout)] += 1
        soak.steps_trained += event.newest_after - event.newest_before
        soak.steps_compared += event.records - (event.outcome.first_step or event.newest_before)
        if hit:
            soak.phases[event.phase] += 1
            soak.saves_under_way += event.save_under_way
            if event.plan.what == "kill":
                alone = event.plan.rank is not None and event.layout.ranks > 1
                soak.single_rank_kills += alone
                soak.kills += not alone
            else:
                soak.terminations += 1
        with open(self.out / "events.jsonl", "a") as file:
            file.write(json.dumps(finite({"seed": seed, "session": session, **event.to_json()})) + "\n")
        self._say(
            f"run {seed} session {session}: {event.layout}, {event.plan.what} in {event.phase}: exit codes "
            f"{event.outcome.exit_codes}, step {event.newest_before} to {event.newest_after}"
        )

    def _after(self, seed: int, folder: Path, problems: list[str]) -> None:
        from ops.soak.checks import folder_bytes
        from ops.soak.report import Leftovers
        from pgm_scale.checkpoint.step_folders import StepFolders

        run = folder / "run"
        steps = StepFolders(run).steps()
        ours = {str(pid) for pid in self._sessions.pids}
        found = Leftovers(
            sum(bool(ours & set(name.replace("-", "_").split("_"))) for name in os.listdir("/dev/shm")),
            sum(1 for _ in self._sessions.temporary.iterdir()),
            folder_bytes(run),
            folder_bytes(StepFolders(run).of(steps[-1])) if steps else 0,
        )
        self.soak.leftovers.append(found)
        if found.shared_memory_files:
            problems.append(f"{found.shared_memory_files} files of dead sessions in /dev/shm")
        if found.temporary_files > _MOST_TEMPORARY_FILES:
            problems.append(f"{found.temporary_files} temporary files")
        for problem in problems:
            self._say(f"VIOLATION in run {seed}: {problem}")
            self.soak.violations.append(f"run {seed}: {problem}")
        if problems:
            shutil.copytree(folder, self.out / "violations" / folder.name, dirs_exist_ok=True)
        shutil.rmtree(folder)

    def _long(self, seed: int, seconds: float) -> None:
        """Nothing happens for some minutes, but many saves and validations."""
        from ops.soak.memory import long_session
        from ops.soak.runs import Layout, TrainedRun

        layouts = [Layout(micro_batch_sequences=16), Layout(data=2), Layout(zero=3), Layout(tensor=2)]
        layout = layouts[len(self.soak.long_sessions) % len(layouts)]
        if layout.ranks > self.most_ranks:
            layout = Layout()
        run = TrainedRun(
            seed=seed, steps=1_000_000, save_interval_steps=10, validation_interval_steps=50, dropout=0.1
        )
        folder = self._work / f"long-{seed}"
        folder.mkdir()
        config = run.write(self._data, folder / "config.yaml")
        arguments = run.arguments(config, folder / "run", layout, asynchronous=True)
        self._say(f"long session of {seconds:.0f} s: {layout}")
        long = long_session(self._sessions, arguments, layout.ranks, seconds, str(layout))
        self.soak.sessions += 1
        self._long_s += seconds
        self.soak.long_sessions.append(long)
        growths = [f"{long.growth(rank):.0f}" for rank in range(layout.ranks)]
        self._say(
            f"long session ended with exit codes {long.outcome.exit_codes}: bytes a step {', '.join(growths)}"
        )
        self._after(seed, folder, list(long.problems()))

    def _say(self, line: str) -> None:
        print(f"{self._elapsed_s / 60:6.1f} min  {line}", flush=True)


def _plan(cycle: Cycle, layout: Layout, choice: random.Random, session: int) -> Plan:
    """What happens to the next session: mostly a kill of all ranks, at any moment."""
    from ops.soak.sessions import Plan

    if session == _MOST_SESSIONS - 1 or cycle.newest == cycle.run.steps:
        return Plan()
    rank = choice.randrange(layout.ranks)
    draw = choice.random()
    if draw < 0.25 and layout.ranks > 1:
        return cycle.plan_at("kill", layout, rank, by_operation=choice.random() < 0.3)
    if draw < 0.55:
        return cycle.plan_at("kill", layout)
    if draw < 0.8:
        return cycle.plan_at("kill", layout, by_operation=True)
    if draw < 0.92:
        return cycle.plan_at("terminate", layout, rank)
    return cycle.plan_at("terminate and kill", layout)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
