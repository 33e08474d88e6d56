"""Finding the programs of Slurm and MUNGE, starting them as daemons, and saying why one did not come up."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pgm_scale.errors import UserError

PACKAGES = "slurm-wlm munge"  # Debian's and Ubuntu's names
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
_START_LIMIT_S = 60


def missing_programs() -> list[str]:
    return [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    """Ordinary users' PATH lacks the folders of daemons."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class Daemons:
    """Those of one Slurm, started by this process; each writes what it says to logs/NAME.out."""

    def __init__(self, configuration: Path) -> None:
        self._configuration = configuration
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str], variables: Mapping[str, str] | None = None) -> None:
        """In a session of its own, with nothing of the user's environment but the PATH."""
        program = shutil.which(command[0], path=_path())
        assert program is not None, "looked for before"
        with open(self._output(name), "ab") as output:
            self._started[name] = subprocess.Popen(
                [program, *command[1:]],
                cwd=self._configuration.parent,
                env={"PATH": _path(), "SLURM_CONF": str(self._configuration), **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_until(self, done: Callable[[], bool], failure: str) -> None:
        """Wait for `done`.

        Raises:
            UserError: a daemon has ended, or it takes too long; with the last lines of that one or of slurmctld.
        """
        deadline = time.monotonic() + _START_LIMIT_S
        while True:
            ended = next((name for name, daemon in self._started.items() if daemon.poll() is not None), None)
            if ended or time.monotonic() > deadline:
                reason = f"{ended} ended" if ended else f"{failure} within {_START_LIMIT_S} s"
                raise UserError(f"no Slurm: {reason}; {self._last_words(ended or 'slurmctld')}")
            if done():
                return
            time.sleep(0.1)

    def _output(self, name: str) -> Path:
        return self._configuration.parent / "logs" / f"{name}.out"

    def _last_words(self, name: str) -> str:
        file = self._output(name)
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        return f"{file} ends with: " + " | ".join(lines[-3:])
