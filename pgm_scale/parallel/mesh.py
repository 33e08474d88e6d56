"""The mesh: which process this is among how many, once they are connected.

It is the only owner of ranks; everything else is handed a `Mesh`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from pgm_scale.config import RunConfig
from pgm_scale.parallel.launch import Launch

COLLECTIVE_TIMEOUT_S = 600


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
