"""kill -9 at 200 random moments of real runs that save every few steps: each goes on exactly where it was."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.parity_runs import write_data
from ops.soak.cycle import Cycle
from ops.soak.runs import Layout, TrainedRun
from ops.soak.sessions import Plan, Sessions

KILLS = 20  # of each of the ten below
MOST_SESSIONS = 3 * KILLS
# What a save does, from its folder to the removal of an old step; every other kill is before one of these, so that
# each is met, whatever the moments of the others are.
SAVE_OPERATIONS = (
    "mkdir .step_",
    "ftruncate rank_",
    "fsync rank_",
    "fsync state.json",
    "fsync manifest.json",
    "fsync .step_",
    "rename .step_",
    "fsync checkpoints",
    "replace .LATEST",
    "rename step_",
)
ONE, TWO = Layout(), Layout(data=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    sessions = Sessions(tmp_path_factory.mktemp("sessions"))
    yield sessions
    sessions.close()


def _plans(cycle: Cycle, layout: Layout) -> Iterator[Plan]:
    """By turns in a save and at any moment of a session's life; of two ranks sometimes one alone is killed."""
    operations = list(SAVE_OPERATIONS)
    cycle.choice.shuffle(operations)
    for number in range(MOST_SESSIONS):
        if number % 2:
            yield cycle.plan_in(operations[number // 2 % len(operations)])
        else:
            alone = layout.ranks > 1 and number % 10 == 4
            yield cycle.plan_at("kill", layout, cycle.choice.randrange(layout.ranks) if alone else None)


@pytest.mark.fault(70)
@pytest.mark.parametrize(
    ("seed", "layout", "save_interval_steps", "asynchronous"),
    [
        (1, ONE, 2, True),
        (2, ONE, 3, True),
        (3, Layout(zero=0), 2, True),
        (4, Layout(zero=2), 3, True),
        (5, Layout(zero=3), 2, True),
        (6, ONE, 2, False),
        (7, ONE, 3, False),
        (8, Layout(zero=3), 3, None),
        (9, TWO, 2, None),
        (10, Layout(data=2, zero=3), 3, True),
    ],
)
def test_every_kill_is_followed_by_an_exact_resume(
    sessions: Sessions,
    data: Path,
    tmp_path: Path,
    seed: int,
    layout: Layout,
    save_interval_steps: int,
    asynchronous: bool | None,
) -> None:
    """`asynchronous` None: sometimes. A run that finishes is compared to its last tensor, and begun anew."""
    choice = random.Random(seed)
    run = TrainedRun(
        "MDLM" if seed % 3 == 0 else "PGM",
        seed,
        steps=40,
        save_interval_steps=save_interval_steps,
        keep_last=1 + seed % 2,
        dropout=0.1,
        timeout_s=20.0,
    )
    cycle = Cycle(sessions, run, layout, data, tmp_path / "runs", seed)
    phases: Counter[str] = Counter()
    under_way = 0
    for plan in _plans(cycle, layout):
        event = cycle.session(
            plan, asynchronous=choice.random() < 0.5 if asynchronous is None else asynchronous
        )
        assert not event.problems, (seed, plan, event.phase, event.problems, event.outcome.output)
        if event.was_killed:
            phases[event.phase] += 1
            under_way += event.save_under_way
        if event.finished or phases.total() == KILLS:
            last = event if event.finished else cycle.session(Plan())
            assert last.finished, last.outcome.output
            assert not last.problems, (seed, last.problems)
            if phases.total() == KILLS:
                break
            cycle.restart()
    print(f"seed {seed}: {dict(phases)}; {under_way} kills left a save under way")
    assert phases.total() == KILLS
    assert phases["commit"] >= 3
    assert phases["save"] >= 2
    assert phases["purge"] >= 1
    assert under_way >= 2
