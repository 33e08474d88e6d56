"""From the engine's live fp32 state to the checkpoint store and back, whatever the layout was or is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pgm_scale.checkpoint.fragments import Fragment, Kind
from pgm_scale.checkpoint.reader import Wanted
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.errors import UserError
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.state import ParameterState
from pgm_scale.training.ema import ExponentialMovingAverage
from pgm_scale.training.weight_source import WeightSource


class Checkpointer:
    """Saves and restores weights, Adam moments and EMA; `step` counts finished updates.

    Everything else that a run needs to go on is a function of the step: order, draws, dropout, learning rate.
    """

    def __init__(self, store: CheckpointStore, engine: Engine, ema: ExponentialMovingAverage | None) -> None:
        self.store = store
        self.engine = engine
        self.ema = ema
        self.seconds = 0.0  # that saves have held up training, since it was last set to 0
        self.save_s = 0.0  # of the longest save so far, from its start to its commit

    @property
    def is_writing(self) -> bool:
        """Whether this rank has still to write its part of the save under way."""
        return self.store.under_way is not None and self.store.under_way.write.is_running

    @property
    def has_failed(self) -> bool:
        return self.store.under_way is not None and self.store.under_way.write.has_failed

    def weights_are_finite(self) -> bool:
        """Of this rank's share. Moments that are not finite would have made the weights so too."""
        ends = [
            torch.stack(torch.aminmax(entry.weight)) for entry in self.engine.state if entry.weight.numel()
        ]
        return not ends or bool(torch.cat(ends).isfinite().all())

    def save(self, step: int, state: dict[str, Any]) -> bool:
        """Collective. False when this step had been saved before."""
        start_s = time.perf_counter()
        with self._timed():
            saved = self.store.save(step, self._owned_fragments(), self._full_state(step, state))
        self.save_s = max(self.save_s, time.perf_counter() - start_s)
        return saved

    def start(self, step: int, state: dict[str, Any]) -> bool:
        """Collective: save in the background; the next update must come after `wait_until_copied`."""
        with self._timed():
            return self.store.start(step, self._owned_fragments(), self._full_state(step, state))

    def wait_until_copied(self) -> None:
        """Before weights, moments or EMA change: wait for the save under way, if any, to have copied them."""
        if self.store.under_way is not None:
            with self._timed():
                self.store.under_way.write.wait_until_copied(self.store.peers.progress)

    def finish(self) -> None:
        """Collective: wait for the save under way and commit it."""
        assert self.store.under_way is not None
        write, start_s = self.store.under_way.write, time.perf_counter()
        with self._timed():
            self.store.finish()
        self.save_s = max(self.save_s, write.seconds + time.perf_counter() - start_s)

    def _full_state(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        return {
            **state,
            "step": step,
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "optimizer_updates": self.engine.updates,
        }

    def reset_optimizer(self) -> None:
        """Moments and count of updates as at the start of a run."""
        for entry in self.engine.state:
            entry.exp_avg.zero_()
            entry.exp_avg_sq.zero_()
        self.engine.restore_updates(0)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start_s

    def restore(self, step: int) -> dict[str, Any]:
        """Collective: load a verified step into the engine and the EMA, and return its state.

        Raises:
            UserError: names or shapes of the checkpoint differ from the model's: all are listed.
        """
        kinds: list[Kind] = ["weight", "exp_avg", "exp_avg_sq"]
        if self.ema is not None and "ema" in self.store.kinds(step):
            kinds.append("ema")
        values = self.store.read(step, self._wanted(kinds))
        state = self.store.state(step)
        counts = [state.get("ema_updates"), state.get("step"), state.get("optimizer_updates", 0)]
        if counts[1] != step or not all(type(count) is int and count >= 0 for count in counts):
            raise UserError(
                f"{self.store.folders.of(step)}: its state is not that of step {step}; use another step"
            )
        with torch.no_grad():
            for index, entry in enumerate(self.engine.state):
                for kind, target in self._targets(index).items():
                    source = kind if kind in kinds else "weight"
                    target.copy_(values[source, entry.name][0])
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]
        # Of older checkpoints they are the same.
        self.engine.restore_updates(state.get("optimizer_updates", state["step"]))
        self.engine.refresh_weights()
        return state

    def initialize(self, weights: WeightSource) -> None:
        """Collective: start from other weights than the drawn ones; the EMA too.

        Raises:
            UserError: names or shapes differ from the model's: all are listed.
        """
        values = weights.read(self._wanted([weights.kind]))
        with torch.no_grad():
            for entry in self.engine.state:
                entry.weight.copy_(values[weights.kind, entry.name][0])
        if self.ema is not None:
            self.ema.restart()
        self.engine.refresh_weights()

    def _wanted(self, kinds: list[Kind]) -> Wanted:
        """What this rank holds of every tensor of the model."""
        held = {entry.name: entry for entry in self.engine.state}
        return {
            (kind, name): (
                shape,
                [(held[name].part, held[name].start, held[name].weight.numel())] if name in held else [],
            )
            for kind in kinds
            for name, shape in self.engine.parameter_shapes.items()
        }

    def _targets(self, index: int) -> dict[Kind, torch.Tensor]:
        entry = self.engine.state[index]
        targets: dict[Kind, torch.Tensor] = {
            "weight": entry.weight,
            "exp_avg": entry.exp_avg,
            "exp_avg_sq": entry.exp_avg_sq,
        }
        if self.ema is not None:
            targets["ema"] = self.ema.values[index]
        return targets

    def _owned_fragments(self) -> Iterator[tuple[Kind, Fragment]]:
        for index, entry in enumerate(self.engine.state):
            first, last = self._owned_range(entry)
            if last > first:
                for kind, values in self._targets(index).items():
                    yield kind, Fragment(entry.name, entry.part, entry.start + first, values[first:last])

    def _owned_range(self, entry: ParameterState) -> tuple[int, int]:
        """What this rank writes of a range that others may hold too.

        Of ranges that all data-parallel ranks hold each writes an even share, so that all disks work; of small
        parameters that are whole on every tensor-parallel rank or stage, the first one writes.
        """
        count = entry.weight.numel()
        if not entry.is_first_copy:
            return 0, 0
        if not entry.replicated:
            return 0, count
        rank, ranks = self.engine.mesh.data_rank, self.engine.mesh.data_ranks
        return rank * count // ranks, (rank + 1) * count // ranks
