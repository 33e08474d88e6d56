"""The alert hook: a user's command that is told of events, and can neither stop nor hold up training."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

from pgm_scale.config import WatchingConfig
from pgm_scale.secrets import redact

logger = logging.getLogger(__name__)

Event = Literal[
    "started",
    "resumed",
    "finished",
    "preempted",
    "skipped",
    "rolled_back",
    "unstable",
    "hung",
    "straggler",
    "failed",
    "crash_loop",
]
TIMEOUT_S = 30.0
_INTERVAL_S = 60.0  # between two alerts of the same event
_MAX_MESSAGE_CHARACTERS = 2000
_SHOWN_CHARACTERS = 200


class Alerts:
    """Runs `command`, if there is one, by the shell, in the background and in a process group of its own.

    It reads PGM_SCALE_EVENT, PGM_SCALE_RUN (the run folder), PGM_SCALE_STEP (empty when it is not known) and
    PGM_SCALE_MESSAGE (one line) from its environment, and is killed after `timeout_s`.
    """

    def __init__(self, command: str | None, folder: str | Path, timeout_s: float = TIMEOUT_S) -> None:
        self._command, self._folder, self._timeout_s = command, Path(folder).absolute(), timeout_s
        self._sent_s: dict[str, float] = {}
        self._running: list[threading.Thread] = []

    def send(self, event: Event, step: int | None, message: str) -> bool:
        """Start the command. False: there is none, or it was started for the same event less than a minute ago."""
        now_s = time.monotonic()
        if self._command is None or now_s - self._sent_s.get(event, -_INTERVAL_S) < _INTERVAL_S:
            return False
        self._sent_s[event] = now_s
        environment = os.environ | {
            "PGM_SCALE_EVENT": event,
            "PGM_SCALE_RUN": str(self._folder),
            "PGM_SCALE_STEP": "" if step is None else str(step),
            "PGM_SCALE_MESSAGE": _one_line(message)[:_MAX_MESSAGE_CHARACTERS],
        }
        thread = threading.Thread(
            target=self._run, args=(self._command, event, environment), name="alert", daemon=True
        )
        self._running = [*(other for other in self._running if other.is_alive()), thread]
        thread.start()
        return True

    def wait(self, seconds: float = TIMEOUT_S + 1) -> None:
        """For the commands under way, up to `seconds` in all."""
        deadline_s = time.monotonic() + seconds
        for thread in self._running:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _run(self, command: str, event: Event, environment: dict[str, str]) -> None:
        try:
            # A pipe would stay open in what the command leaves behind.
            with tempfile.TemporaryFile() as output:
                failure = _failure(command, environment, output.fileno(), self._timeout_s)
                if failure:
                    output.seek(0)
                    said = _one_line(output.read(1 << 16).decode(errors="replace"))
                    logger.warning(
                        "the alert command for %s %s: %s", event, failure, said[-_SHOWN_CHARACTERS:]
                    )
        except (OSError, ValueError) as error:
            logger.warning("the alert command for %s cannot be started: %s", event, error)


def _one_line(text: str) -> str:
    """Without secrets, which may have several lines."""
    return " ".join(redact(text).replace("\0", "").split())


def _failure(command: str, environment: dict[str, str], output: int, timeout_s: float) -> str:
    """How the command failed; empty when it did not."""
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    )
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"took longer than {timeout_s:g} s and was killed"
    return f"failed with exit code {code}" if code else ""


def alert(
    config: WatchingConfig, event: Event, folder: str | Path, message: str, step: int | None = None
) -> None:
    """From outside a run: run its alert command and wait for it, up to its time-out. Raises nothing."""
    alerts = Alerts(config.alert_command, folder)
    alerts.send(event, step, message)
    alerts.wait()
