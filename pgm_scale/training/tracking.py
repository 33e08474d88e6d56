"""Weights & Biases: one tracker run for the whole life of a run, each step in it once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from pgm_scale import config as configuration
from pgm_scale.config import RunConfig
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    def log(self, step: int, values: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class WandbTracker:
    """Logs under the run's own id. The last step sent is kept in the run folder: a run that was killed after
    its last checkpoint repeats some steps, which are then not sent again."""

    def __init__(self, config: RunConfig, run_id: str, folder: Path) -> None:
        import wandb

        self._last_path = folder / "tracker.json"
        self._last_step = -1
        if self._last_path.exists():
            self._last_step = json.loads(self._last_path.read_text())["last_step"]
        try:
            self._run = wandb.init(
                project=config.tracking.project,
                entity=config.tracking.entity,
                name=config.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                mode=config.tracking.wandb,
                config=configuration.to_mapping(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb cannot start ({error}); log in, or set tracking.wandb to offline or disabled"
            ) from None

    def log(self, step: int, values: dict[str, Any]) -> None:
        if step <= self._last_step:
            return
        self._run.log(values, step=step)
        self._last_step = step
        atomic_write_bytes(self._last_path, json.dumps({"last_step": step}).encode())

    def close(self) -> None:
        self._run.finish()


def open_tracker(config: RunConfig, run_id: str, folder: Path) -> Tracker:
    if config.tracking.wandb == "disabled":
        return NoTracker()
    return WandbTracker(config, run_id, folder)
