"""Weights & Biases: one tracker run for the whole life of a run, each step in it once.

The run's own log is the truth, and the tracker a copy of it: a tracker that fails stops nothing, and the next
session sends what it has missed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import psutil

from pgm_scale import config as configuration
from pgm_scale.config import RunConfig
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, finite
from pgm_scale.parallel.rendezvous import within
from pgm_scale.run_folder import RunFolder

logger = logging.getLogger(__name__)
_LAST_NAME = "tracker.json"
_UNSAFE_S = 5.0  # a record that was handed over so long ago is in wandb's file


class Tracker(Protocol):
    def log(self, record: dict[str, Any]) -> None:
        """Take over a record of the run's log; its step is in it."""

    def close(self, patience_s: float) -> None:
        """Hand over the last records, as far as that takes no longer."""


class NoTracker:
    def log(self, record: dict[str, Any]) -> None:
        pass

    def close(self, patience_s: float) -> None:
        pass


class WandbTracker:
    """Logs under the run's own id.

    The run folder keeps the last step that the tracker has for sure: of a session that was killed after its last
    checkpoint some steps are repeated, which are then not sent again, and what wandb's own process had not written
    when it died is. Slurm's signals end that process, and no blocking or ignoring of them keeps it.
    """

    def __init__(self, config: RunConfig, run_id: str, folder: Path) -> None:
        import wandb

        self._last_path = folder / _LAST_NAME
        self._last_step = _last_step(self._last_path)
        # When each step was handed over that may get lost.
        self._under_way: deque[tuple[float, int]] = deque()
        others = set(_children())
        try:
            self._run: Any = wandb.init(
                project=config.tracking.project,
                entity=config.tracking.entity,
                name=config.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                mode=config.tracking.wandb,
                config=configuration.to_mapping(config),
            )
        except Exception as error:  # its own errors, and those of the process that it starts
            raise UserError(
                f"wandb cannot start ({error}); log in, or set tracking.wandb to offline or disabled"
            ) from None
        self._service = [process for process in _children() if process not in others]

    def log(self, record: dict[str, Any]) -> None:
        step, now_s = record["step"], time.monotonic()
        if self._run is None or step <= self._last_step:
            return
        try:
            self._run.log(scalars(record), step=step)
        except Exception as error:  # whatever its connection to its process raises
            logger.warning(
                "wandb takes no records any more (%s: %s); the next session of the run will send them",
                type(error).__name__,
                error,
            )
            self._run = None
            return
        self._under_way.append((now_s, step))
        self._settle(now_s - _UNSAFE_S)

    def close(self, patience_s: float) -> None:
        if self._run is None:
            self._end_service()
            return
        try:
            within(patience_s, self._run.finish)
        except Exception as error:  # it waits for ever for a process that has died, or for the network
            logger.warning("wandb has not ended well (%s); nothing of the run is lost", type(error).__name__)
            self._end_service()
            return
        self._settle(float("inf"))

    def _end_service(self) -> None:
        """Else this process would wait for it in its exit, until its job ends and cannot be requeued any more."""
        for process in self._service:
            with contextlib.suppress(psutil.Error):  # it has ended by itself
                process.kill()

    def _settle(self, before_s: float) -> None:
        """Write down the last step that was handed over before this moment."""
        settled = None
        while self._under_way and self._under_way[0][0] < before_s:
            settled = self._under_way.popleft()[1]
        if settled is None:
            return
        try:
            atomic_write_bytes(self._last_path, json.dumps({"last_step": settled}).encode())
        except OSError as error:  # these steps may be sent twice
            logger.warning("%s cannot be written (%s)", self._last_path, error.strerror)


def _children() -> list[psutil.Process]:
    """The processes that this one has started."""
    return psutil.Process().children(recursive=True)


def _last_step(path: Path) -> int:
    """-1 where there is none, or a damaged one: all is sent again."""
    try:
        return int(json.loads(path.read_bytes())["last_step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return -1


def open_tracker(config: RunConfig, run_id: str, folder: Path) -> Tracker:
    """The configured one, with the records that the run's log has and it has not.

    Raises:
        UserError: it cannot start in the first session of a run. A later one, maybe of a requeued job, goes on
            without it.
    """
    if config.tracking.wandb == "disabled":
        return NoTracker()
    try:
        tracker = WandbTracker(config, run_id, folder)
    except UserError as error:
        if not (folder / _LAST_NAME).exists():
            raise
        logger.warning("%s; this session goes on without it, and the next one sends what is missing", error)
        return NoTracker()
    metrics = RunFolder(folder).metrics_path
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        tracker.log(json.loads(line))
    return tracker


def scalars(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a record, by the names that they have in the tracker."""
    values = {key: value for key, value in finite(record).items() if isinstance(value, (int, float))}
    for bucket, value in enumerate(record.get("cross_entropy_by_mask_fraction", [])):
        values[f"cross_entropy_by_mask_fraction/{bucket / 10:.1f}"] = value
    return finite(values)
