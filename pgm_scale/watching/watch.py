"""What a run tells the world outside while it trains: its heartbeat, Prometheus' text, and alerts.

Rank 0 writes all of it. Nothing here may stop training, or hold it up for longer than a small write: a file that
cannot be written is said once, and an alert runs in the background.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pgm_scale.config import RunConfig
from pgm_scale.errors import HungRankError, Preempted, UnstableError, UserError
from pgm_scale.holder import node_name
from pgm_scale.parallel.hangs import Verdict
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.secrets import redact
from pgm_scale.watching.alerts import Alerts, Event
from pgm_scale.watching.heartbeat import (
    HEARTBEAT_NAME,
    ActiveState,
    Heartbeat,
    job_name,
    read_heartbeat,
    remove_unfinished,
    replace_file,
)
from pgm_scale.watching.prometheus import PROMETHEUS_NAME, prometheus_text
from pgm_scale.watching.stragglers import Straggler

logger = logging.getLogger(__name__)

_INTERVAL_S = 5.0  # between two heartbeats without a change of the state
_SHORT_ALERT_S = 4.0  # of the 5 s that the watchdog gives; a preempted job has little time too
_MAX_REASON_CHARACTERS = 1000
_KEPT = ("step", "run_id", "loss", "last_checkpoint_step")
_RECORDED = ("tokens_per_second", "gradient_norm", "learning_rate", "mfu", "validation_perplexity")


class RunWatch:
    """One session of a run, as the world outside is told of it.

    Made and entered on every rank; entered outermost it sees how the session ends. It writes nothing before
    `begin`, when the run folder is locked: until then the files there may be those of another session that lives.
    """

    def __init__(self, config: RunConfig, rank: int, ranks: int) -> None:
        self._folder, self._prometheus_folder = Path(config.folder), config.watching.prometheus_folder
        self._is_main = rank == 0
        self._begun = False
        self._thread = threading.get_ident()
        self._due_s = 0.0
        self._unwritable: set[Path] = set()
        self._straggler = self._alerted_of = -1  # the slow rank, and the last that was told of
        self._alerts = Alerts(config.watching.alert_command, config.folder)
        now_s = time.time()
        self._beat = Heartbeat(
            run=config.name,
            state="starting",
            step=0,
            total_steps=config.training.steps,
            unix_time_s=now_s,
            started_unix_time_s=now_s,
            timeout_s=config.parallel.timeout_s,
            ranks=ranks,
            restarts=0,
            host=node_name(),
            pid=os.getpid(),
            job=job_name(),
        )

    def begin(self, mesh: Mesh) -> Mesh:
        """The run folder is ours. Returns the mesh whose `progress` beats too, when a heartbeat is due."""
        self._begun = True
        if not self._is_main:
            return mesh
        with contextlib.suppress(OSError):  # a write below will say it
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in (HEARTBEAT_NAME, PROMETHEUS_NAME):
                remove_unfinished(self._folder / name)
        try:
            before = read_heartbeat(self._folder)
            if before is not None:  # how far the run is stands there also if this session is refused
                known = {name: getattr(before, name) for name in _KEPT}
                self._set(restarts=before.restarts + 1, **known)
        except ValueError as error:
            logger.warning("the heartbeat of the last session is damaged (%s); restarts count from 0", error)
        self._write()

        def progress(what: str, step: int | None = None) -> None:
            mesh.progress(what, step)
            # Of the training thread only: others may go on while it hangs.
            if time.monotonic() >= self._due_s and threading.get_ident() == self._thread:
                self._write()

        return dataclasses.replace(mesh, progress=progress)

    def opened(self, run_id: str, first_step: int) -> None:
        """The run has its weights, of `first_step` finished updates, which are a checkpoint's unless it is 0."""
        self._set(run_id=run_id, step=first_step)
        if first_step:
            self._set(last_checkpoint_step=first_step)
        self._write()
        if first_step:
            self._alert("resumed", f"resumed from the checkpoint of step {first_step}")
        else:
            self._alert("started", f"started, {self._beat.total_steps} steps to go")

    def step(self, step: int, loss: float) -> None:
        """`step` updates are finished. Cheap: a heartbeat is written when it is due."""
        begins = self._beat.state != "training"
        self._set(state="training", step=step, loss=loss)
        if begins or time.monotonic() >= self._due_s:
            self._write()

    @contextmanager
    def during(self, state: ActiveState) -> Iterator[None]:
        """The run is in `state` for a while."""
        before = self._beat.state
        self._set(state=state)
        self._write()
        yield
        self._set(state=before)
        self._write()

    def record(self, record: dict[str, Any], slowest_rank_ratio: float | None) -> None:
        """The metrics of the newest record; the next heartbeat has them."""
        self._set(slowest_rank_ratio=slowest_rank_ratio, **{k: record[k] for k in _RECORDED if k in record})

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is committed."""
        self._set(last_checkpoint_step=step)

    def slow(self, step: int, straggler: Straggler | None) -> str | None:
        """A line to print when a rank begins to be slow. It is alerted once too, later if it comes too soon."""
        rank = -1 if straggler is None else straggler.rank
        is_news, self._straggler = rank != self._straggler, rank
        if straggler is None:
            self._alerted_of = -1
            return None
        line = f"step {step}: {straggler}"
        if rank != self._alerted_of and self._alert("straggler", line):
            self._alerted_of = rank
        return line if is_news else None

    def unstable(self, event: Event, step: int, message: str) -> None:
        """A step was not learnt from, and the run goes on, with `step` updates finished."""
        self._set(step=step)
        self._alert(event, message)

    def hung(self, verdict: Verdict) -> None:
        """For the watchdog of the rank that judges, in a thread of its own: this process ends in some seconds."""
        if not self._begun:
            return
        if not self._is_main:  # rank 0 cannot: what it wrote last is all that is known
            try:
                self._beat = read_heartbeat(self._folder) or self._beat
            except ValueError as error:
                logger.warning("the heartbeat is damaged (%s) and written anew", error)
            self._is_main = True
        self._end("failed", "hung", verdict.line, "hung")
        self._alerts.wait(_SHORT_ALERT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self._begun and self._is_main):
            return
        if error is None:
            self._set(state="finished", exit_reason=None)
            self._write()
            self._alert("finished", f"finished {self._beat.step} steps")
        elif isinstance(error, Preempted):
            self._end("stopped:preempted", "", str(error), "preempted")
            self._alerts.wait(_SHORT_ALERT_S)
            return
        elif isinstance(error, UnstableError):
            self._end("failed", "unstable", str(error), "unstable")
        elif isinstance(error, HungRankError):
            self._end("failed", "hung", str(error), "hung")
        elif isinstance(error, UserError | KeyboardInterrupt | MemoryError):
            self._end("failed", "error", str(error) or type(error).__name__, "failed")
        else:
            self._end("failed", "bug", f"{type(error).__name__}: {error}", "failed")
        self._alerts.wait()

    def _end(self, state: str, kind: str, text: str, event: Event) -> None:
        line = " ".join(redact(text).split())[:_MAX_REASON_CHARACTERS]
        self._set(state=state, exit_reason=f"{kind}: {line}" if kind else line)
        self._write()
        self._alert(event, line)

    def _alert(self, event: Event, message: str) -> bool:
        """Whether the command was started."""
        return self._is_main and self._alerts.send(event, self._beat.step, f"{self._beat.run}: {message}")

    def _set(self, **values: Any) -> None:
        self._beat = dataclasses.replace(self._beat, **values)

    def _write(self) -> None:
        if not (self._begun and self._is_main):
            return
        self._due_s = time.monotonic() + _INTERVAL_S
        self._set(unix_time_s=time.time())
        beat = self._beat
        files = {self._folder / HEARTBEAT_NAME: beat.to_bytes()}
        if beat.run_id is not None:
            text = prometheus_text(beat).encode(errors="replace")
            files[self._folder / PROMETHEUS_NAME] = text
            if self._prometheus_folder is not None:
                name = f"pgm_scale_{re.sub(r'[^A-Za-z0-9_-]', '_', beat.run_id)}.prom"
                files[Path(self._prometheus_folder) / name] = text
        for path, data in files.items():
            self._replace(path, data)

    def _replace(self, path: Path, data: bytes) -> None:
        try:
            replace_file(path, data)
        except OSError as error:
            if path not in self._unwritable:
                self._unwritable.add(path)
                logger.warning("%s cannot be written (%s); training goes on", path, error.strerror)
