"""What the launcher says about this process, from torchrun's or Slurm's environment."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from pgm_scale.errors import UserError


@dataclass(frozen=True)
class Launch:
    """What the launcher says: one process (`source` "single"), torchrun, or a bare srun.

    `agent_attempt` counts torchrun's starts of the ranks, where its agent serves a store at the master's address
    that outlives them; None where rank 0 has to serve one.
    """

    source: str
    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int
    agent_attempt: int | None = None


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's variables, else those of a Slurm job step, else be the only process.

    Raises:
        UserError: the variables of one launcher are incomplete, or their numbers cannot be.
    """
    launch = _found(environment)
    wrong = [
        f"rank {launch.rank} of {launch.world_size}" if not 0 <= launch.rank < launch.world_size else "",
        f"local rank {launch.local_rank}" if launch.local_rank < 0 else "",
        f"port {launch.master_port}" if not 0 < launch.master_port < 1 << 16 else "",
    ]
    if any(wrong):
        raise UserError(
            f"the launcher's environment says {', '.join(filter(None, wrong))}, which cannot be; start with "
            "torchrun, with srun, or alone"
        )
    return launch


def _found(environment: Mapping[str, str]) -> Launch:
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return Launch(
                "torchrun",
                int(environment["RANK"]),
                int(environment["WORLD_SIZE"]),
                int(environment.get("LOCAL_RANK", "0")),
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
                _agent_attempt(environment),
            )
        # A batch script run without srun has SLURM_PROCID too, but no step of its own.
        if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
            return Launch(
                "srun",
                int(environment["SLURM_PROCID"]),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                int(environment["SLURM_LOCALID"]),
                environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
                int(environment.get("MASTER_PORT") or _slurm_port(environment)),
            )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher's environment is incomplete ({error}); start with torchrun, with srun, or alone"
        ) from None
    return Launch("single", 0, 1, 0, "127.0.0.1", free_port())


def _agent_attempt(environment: Mapping[str, str]) -> int | None:
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[007-010,12],login1` gives gpu007."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodelist)
    if match is None:
        raise ValueError(f"cannot read the node list {nodelist!r}")
    return match.group(1) + (match.group(2) or "")


def _slurm_port(environment: Mapping[str, str]) -> int:
    """Equal on all tasks of a step, another after each requeue, so that a dying run cannot be in the way."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return 20_000 + (job * 131 + step * 17 + restarts * 7) % 12_000  # below the ephemeral ports


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
