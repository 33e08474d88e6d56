"""Steps that a run must not learn from: a loss or gradient that is not finite, or a spike; and what to do then.

What is decided depends only on numbers that all ranks agree on, so they do the same without asking each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal, NamedTuple

from pgm_scale import config as configuration
from pgm_scale.config import StabilityConfig
from pgm_scale.data.order import data_step
from pgm_scale.errors import UnstableError, UserError
from pgm_scale.files import atomic_write_bytes, read_bounded
from pgm_scale.sealed import open_sealed_json, sealed_json

_RECENT_STEPS = 1000  # the name of `most_per_1000_steps` says it
_MOST_TO_ONE_CHECKPOINT = 3  # roll backs: then it is not the data


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

    def __init__(
        self, config: StabilityConfig, path: Path, roll_backs: Sequence[RollBack] | None = None
    ) -> None:
        """`roll_backs` are what `read_roll_backs` has found at `path`, equal on all ranks."""
        self.config, self._path = config, path
        self.skipped_steps: list[int] = []
        self._has_file = roll_backs is not None
        self.roll_backs = list(roll_backs or ())
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
                f"{what}; {stands}: look at these samples, set stability.on_{found.kind} to skip or roll_back, or "
                "train in a new folder with a lower optimizer.learning_rate"
            )
        earlier = [*self.skipped_steps, *(back.step for back in self.roll_backs)]
        recent = sum(step - _RECENT_STEPS < other for other in earlier)
        if recent >= self.config.most_per_1000_steps:
            raise UnstableError(
                f"{what}, after {recent} such steps of the last {_RECENT_STEPS}, and "
                f"stability.most_per_1000_steps is {self.config.most_per_1000_steps}; {stands}: raise it, look at "
                "the data, or train in a new folder with a lower optimizer.learning_rate"
            )
        return action

    def check_worth(self, checkpoint_step: int, found: Instability) -> None:
        """Raises: UnstableError: there were so many roll backs to this checkpoint that it cannot be the data."""
        count = sum(back.checkpoint_step == checkpoint_step for back in self.roll_backs)
        if count >= _MOST_TO_ONE_CHECKPOINT:
            raise UnstableError(
                f"{found.reason} on {found.where}, after {count} roll backs to the checkpoint of step "
                f"{checkpoint_step}: it is not the data. If the level of losses has changed, set "
                "stability.on_spike to ignore for a while; else train in a new folder with a lower "
                "optimizer.learning_rate"
            )

    def roll_back(self, step: int, checkpoint_step: int, reason: str) -> RollBack:
        """Leave out the data of `step` and of those before it, as far as `checkpoint_step`, from now on."""
        last = data_step(step, self.left_out)
        oldest = data_step(checkpoint_step, self.left_out)  # what was trained on before stays as it was
        first = max(oldest, last - self.config.roll_back_data_steps + 1)
        back = RollBack(step, checkpoint_step, (first, last), reason)
        self.roll_backs.append(back)
        self._has_file = True
        return back

    def write(self, run_id: str) -> None:
        """On one rank, before the run goes on: a session may end before its next checkpoint."""
        content = {"run_id": run_id, "roll_backs": [asdict(back) for back in self.roll_backs]}
        atomic_write_bytes(self._path, sealed_json(content))

    def record(self) -> dict[str, int]:
        """For the run's log: how often so far, where it was ever."""
        counts = {"skipped_updates": len(self.skipped_steps), "roll_backs": len(self.roll_backs)}
        return {name: count for name, count in counts.items() if count}

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return asdict(_Memory(tuple(self.roll_backs), tuple(self.skipped_steps), tuple(self._history)))

    def restore(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on from the checkpoint of `step`, with the roll backs that came after it too.

        Args:
            state: None of a checkpoint that has none.

        Raises:
            UserError: the roll backs are not those of this run.
        """
        problems: list[str] = []
        memory = _Memory(()) if state is None else configuration.parse(_Memory, state, problems)
        if problems:
            raise UserError(f"the checkpoint's state of training.stability is damaged: {'; '.join(problems)}")
        if state is not None and not self._has_file:
            raise UserError(f"{self._path} is missing, which says what data are left out; {_MEND}")
        later = [back for back in self.roll_backs if back not in memory.roll_backs]
        self.roll_backs = list(memory.roll_backs)
        reached = data_step(step, self.left_out)
        if any(back.data_steps[0] < reached for back in later):
            raise UserError(
                f"{self._path} leaves out data that the checkpoint of step {step} has seen; {_MEND}"
            )
        self.roll_backs += later
        self.skipped_steps = list(memory.skipped_steps)
        self._history.clear()
        self._history.extend(memory.history)


_MEND = (
    "restore it, or write {} into it: then only the roll backs that the newest checkpoint knows are kept, and the "
    "data of later ones are trained on again"
)


@dataclass(frozen=True)
class _File:
    run_id: str
    roll_backs: tuple[RollBack, ...]


def read_roll_backs(path: Path, run_id: str) -> tuple[RollBack, ...] | None:
    """None where there is no file.

    Raises:
        UserError: it is damaged, or another run's.
    """
    problems: list[str] = []
    try:
        if not path.exists() and not path.is_symlink():
            return None
        data = read_bounded(path)
        if data.strip() == b"{}":
            return ()
        found = configuration.parse(_File, open_sealed_json(data), problems)
    except (OSError, ValueError) as error:
        problems = [str(error)]
    else:
        if not problems and found.run_id != run_id:
            problems = [f"it is of run {found.run_id}, not of {run_id}"]
        elif not problems and not all(
            0 <= b.data_steps[0] <= b.data_steps[1] < 1 << 48 for b in found.roll_backs
        ):
            problems = ["its data steps are no ranges"]
    if problems:
        raise UserError(f"{path} is damaged: {' '.join('; '.join(problems).split())}; {_MEND}")
    return found.roll_backs
