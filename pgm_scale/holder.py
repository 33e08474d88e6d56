"""A process by a name that outlives it: its host, the start of its kernel, its id; and whether it still lives."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine as its users name it: Slurm's name of the node, by which it can be excluded, or the host's."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Holder:
    """The process that holds a run's lock. `machine` is the kernel's boot id and the process-id namespace."""

    host: str
    machine: str
    pid: int
    start_ticks: str  # the kernel's start time of the process: tells a reused process id
    job: str

    @staticmethod
    def here() -> Holder:
        pid = os.getpid()
        start = start_ticks(pid)
        assert start is not None
        return Holder(node_name(), _machine(), pid, start, os.environ.get("SLURM_JOB_ID", "none"))

    def lives(self) -> bool | None:
        """Whether the process lives; None when it ran on another machine, which cannot be asked from here."""
        return start_ticks(self.pid) == self.start_ticks if self.machine == _machine() else None

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Holder | None:
        """None when the bytes are no holder: a damaged lock, or one of another kind."""
        try:
            holder = Holder(**json.loads(data))
        except (ValueError, TypeError, RecursionError):
            return None
        texts = (holder.host, holder.machine, holder.start_ticks, holder.job)
        is_one = type(holder.pid) is int and all(
            isinstance(text, str) and text.isprintable() for text in texts
        )
        return holder if is_one else None

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, job {self.job}"


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def start_ticks(pid: int) -> str | None:
    """Start time of a living process in kernel ticks; None when there is none, or only its zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else fields[18]
