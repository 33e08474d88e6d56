"""The mesh: which process this is among how many, found from torchrun's or Slurm's environment.

It is the only owner of ranks; everything else is handed a `Mesh`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from pgm_scale.config import RunConfig
from pgm_scale.errors import UserError

COLLECTIVE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Launch:
    """What the launcher says: one process (`source` "single"), torchrun, or a bare srun."""

    source: str
    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int


@dataclass(frozen=True)
class Mesh:
    """This process's place. Data parallelism spans all ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def data_rank(self) -> int:
        return self.rank

    @property
    def data_ranks(self) -> int:
        return self.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float64 vector over all ranks; blocks until every rank has joined."""
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, value: object) -> list:
        """One small picklable object from each rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        self.sum(np.zeros(1))


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's variables, else those of a Slurm job step, else be the only process.

    Raises:
        UserError: the variables of one launcher are incomplete or not numbers.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return Launch(
                "torchrun",
                int(environment["RANK"]),
                int(environment["WORLD_SIZE"]),
                int(environment.get("LOCAL_RANK", "0")),
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
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


def layout_problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything that does not divide, all at once, known before a process group exists."""
    training = config.training
    per_pass = training.micro_batch_sequences * world_size
    if training.global_batch_sequences % per_pass:
        return [
            f"training.global_batch_sequences {training.global_batch_sequences} is not divisible by "
            f"micro_batch_sequences {training.micro_batch_sequences} x {world_size} data-parallel ranks = "
            f"{per_pass}; change one of them"
        ]
    return []


def connect(launch: Launch) -> Mesh:
    """Join the process group (NCCL where this process has a GPU, gloo elsewhere) and return the mesh."""
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        # What DeepSpeed selects its device by; a task that sees one GPU only has device 0.
        LOCAL_RANK=str(device.index if device.type == "cuda" else launch.local_rank),
        MASTER_ADDR=launch.master_address,
        MASTER_PORT=str(launch.master_port),
    )
    dist.init_process_group(
        backend,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    return Mesh(launch.rank, launch.world_size, launch.local_rank, device)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
