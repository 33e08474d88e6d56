"""Steps that a run must not learn from: a loss or gradient that is not finite, or a spike; and what to do then.

What is decided depends only on numbers that all ranks agree on, so they do the same without asking each other.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal, NamedTuple

from pgm_scale import config as configuration
from pgm_scale.config import StabilityConfig
from pgm_scale.data.order import data_step
from pgm_scale.errors import UnstableError, UserError
from pgm_scale.files import atomic_write_bytes

_RECENT_STEPS = 1000  # the name of `most_per_1000_steps` says it


class Instability(NamedTuple):
    """Why a step must not be learnt from, as the begin of a sentence, and on which ranks and samples."""

    kind: Literal["non_finite", "spike"]
    reason: str
    where: str = "all ranks"


@dataclass(frozen=True)
class RollBack:
    """From `step`, counted from 0, which was not learnt from, back to the checkpoint of `checkpoint_step`.

    Attributes:
        data_steps: the first and the last step whose data are left out since, see `data.order.data_step`.
    """

    step: int
    checkpoint_step: int
    data_steps: tuple[int, int]
    reason: str


@dataclass(frozen=True)
class _Memory:
    """What outlives a session: all of it in checkpoints, the roll backs in a file too."""

    roll_backs: tuple[RollBack, ...]
    skipped_steps: tuple[int, ...] = ()
    history: tuple[tuple[float, float], ...] = ()


class Stability:
    """The judge of a run's steps."""

    def __init__(self, config: StabilityConfig, path: Path) -> None:
        """`path`: the file of roll backs. Raises: UserError: it is damaged."""
        self.config, self._path = config, path
        self.skipped_steps: list[int] = []
        self.roll_backs = list(_read(path))
        self._history: deque[tuple[float, float]] = deque(maxlen=config.spike_history_steps)

    @property
    def watches_spikes(self) -> bool:
        return self.config.on_spike != "ignore"

    @property
    def left_out(self) -> tuple[tuple[int, int], ...]:
        """The data steps of all roll backs as ranges that are ascending and disjoint."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted(back.data_steps for back in self.roll_backs):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return tuple(merged)

    def judge(self, loss: float, gradient_norm: float) -> Instability | None:
        """Of a step that is about to update, from values of the whole batch. Changes nothing."""
        values = {"loss": loss, "gradient norm": gradient_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return Instability("non_finite", f"the {name} is not finite")
        if not self.watches_spikes or 2 * len(self._history) < self.config.spike_history_steps:
            return None
        for (name, value), before in zip(values.items(), zip(*self._history, strict=True), strict=True):
            mean, deviation = fmean(before), pstdev(before)
            if value > mean + self.config.spike_deviations * deviation:
                steps = f"the {len(before)} steps before it have {mean:.4g} +- {deviation:.2g}"
                return Instability("spike", f"the {name} of {value:.4g} is a spike ({steps})")
        return None

    def learnt(self, loss: float, gradient_norm: float) -> None:
        """An update was done with these: later steps are compared with them."""
        if self.watches_spikes:
            self._history.append((loss, gradient_norm))

    def action(self, step: int, found: Instability) -> Literal["skip", "roll_back"]:
        """What to do about `step`, counted from 0.

        Raises:
            UnstableError: to end the run.
        """
        what = f"{found.reason} at step {step} on {found.where}"
        stands = "no weights were changed by it and the last checkpoint stands"
        action = self.config.on_non_finite if found.kind == "non_finite" else self.config.on_spike
        if action == "stop" or action == "ignore":
            raise UnstableError(
                f"{what}; {stands}: look at these samples, lower optimizer.learning_rate, or set "
                f"stability.on_{found.kind} to skip or roll_back"
            )
        earlier = [*self.skipped_steps, *(back.step for back in self.roll_backs)]
        recent = sum(step - _RECENT_STEPS < other for other in earlier)
        if recent >= self.config.most_per_1000_steps:
            raise UnstableError(
                f"{what}, after {recent} such steps of the last {_RECENT_STEPS}, and "
                f"stability.most_per_1000_steps is {self.config.most_per_1000_steps}; {stands}: lower "
                "optimizer.learning_rate, or look at the data"
            )
        return action

    def roll_back(self, step: int, checkpoint_step: int, reason: str) -> RollBack:
        """Leave out the data of `step` and of those before it, as far as `checkpoint_step`, from now on."""
        last = data_step(step, self.left_out)
        oldest = data_step(checkpoint_step, self.left_out)  # what was trained on before stays as it was
        first = max(oldest, last - self.config.roll_back_data_steps + 1)
        back = RollBack(step, checkpoint_step, (first, last), reason)
        self.roll_backs.append(back)
        return back

    def write(self) -> None:
        """On one rank, before the run goes on: a session may end before its next checkpoint."""
        content = {"roll_backs": [asdict(back) for back in self.roll_backs]}
        atomic_write_bytes(self._path, (json.dumps(content, indent=2) + "\n").encode())

    def record(self) -> dict[str, int]:
        """For the run's log: how often so far, where it was ever."""
        counts = {"skipped_updates": len(self.skipped_steps), "roll_backs": len(self.roll_backs)}
        return {name: count for name, count in counts.items() if count}

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return asdict(_Memory(tuple(self.roll_backs), tuple(self.skipped_steps), tuple(self._history)))

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, with the roll backs that came after it too; None: it has no such state."""
        problems: list[str] = []
        memory = _Memory(()) if state is None else configuration.parse(_Memory, state, problems)
        if problems:
            raise UserError(f"the checkpoint's state of training.stability is damaged: {'; '.join(problems)}")
        self.roll_backs += [back for back in memory.roll_backs if back not in self.roll_backs]
        self.skipped_steps = list(memory.skipped_steps)
        self._history.clear()
        self._history.extend(memory.history)


def _read(path: Path) -> tuple[RollBack, ...]:
    problems: list[str] = []
    try:
        memory = configuration.parse(_Memory, json.loads(path.read_bytes()), problems)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        problems = [str(error)]
    else:
        if not problems and not all(0 <= b.data_steps[0] <= b.data_steps[1] for b in memory.roll_backs):
            problems = ["its data steps are no ranges"]
    if problems:
        raise UserError(
            f"{path} is damaged: {'; '.join(problems)}; restore it, or delete it: the newest checkpoint knows the "
            "roll backs before it"
        )
    return memory.roll_backs
