"""Which processes belong to the local Slurm of a folder, and how they are ended.

Process ids in files go stale, so its processes are known by what they are: daemons that run in the folder, and
tasks to which Slurm gave SLURM_CONF and SLURMD_NODENAME. A shell in which a user exported SLURM_CONF is neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from psutil import Process

_DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")


def find_processes(configuration: Path, node: str | None = None) -> list[Process]:
    """The live processes of the Slurm with this slurm.conf: daemons, steps and tasks; those of a node if named."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # ended meanwhile, a zombie, or another user's
            environment = _environment(process.pid)
            task = environment.get("SLURM_CONF") == str(configuration) and "SLURMD_NODENAME" in environment
            ours = task or (is_daemon(process) and process.cwd() == str(configuration.parent))
            if ours and node in (None, environment.get("SLURMD_NODENAME")):
                found.append(process)
    return found


def _environment(process_id: int) -> dict[str, str]:
    """As psutil reads it, but on beyond a gap: slurmstepd writes its title over the first variables."""
    block = Path(f"/proc/{process_id}/environ").read_bytes().decode(errors="replace")
    return dict(entry.split("=", 1) for entry in block.split("\0") if "=" in entry)


def name_of(process: Process) -> str:
    """The program's name, empty once it has ended."""
    with suppress(psutil.Error):
        return process.name()
    return ""


def is_daemon(process: Process) -> bool:
    """Whether it is one of Slurm's or MUNGE's, not of a job."""
    return name_of(process) in _DAEMONS


def end_all(find_them: Callable[[], list[Process]], patience_s: float) -> None:
    """SIGTERM to what `find_them` finds, SIGKILL to what it finds `patience_s` later, until it finds nothing."""
    deadline = time.monotonic() + patience_s
    for process in find_them() if patience_s > 0 else []:
        with suppress(psutil.Error):
            process.terminate()
    while left := find_them():
        if time.monotonic() >= deadline:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(0.05)
