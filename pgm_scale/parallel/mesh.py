"""The mesh: which process this is among how many, once they are connected, and the groups it belongs to.

It is the only owner of ranks; everything else is handed a `Mesh`. Megatron-core makes the groups, in its order:
neighbouring ranks are tensor-parallel, then data-parallel, then pipeline stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pgm_scale.config import ParallelConfig
from pgm_scale.errors import UserError
from pgm_scale.parallel.hangs import Verdict
from pgm_scale.parallel.launch import Launch
from pgm_scale.parallel.rendezvous import join, rank_map
from pgm_scale.parallel.watchdog import Watchdog

_PATIENCE = 5  # times the watchdog's, of collectives
_FILES, _FILES_PER_RANK = 64, 2  # logs, shards, libraries; two connections to the store


@dataclass(frozen=True)
class Groups:
    """This rank's process groups in a layout with tensor or pipeline parallelism.

    Attributes:
        tensor: the ranks that share each of this stage's layers.
        data: the ranks that hold the same part of the model, for other samples.
        pipeline: the stages of one model copy, at this tensor rank.
        model: all ranks of one model copy, tensor x pipeline.
    """

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model: dist.ProcessGroup


def _unwatched(what: str, step: int | None = None) -> None:
    """Progress of a process that has no others to wait for."""


@dataclass(frozen=True)
class Mesh:
    """This process's place among the ranks.

    Attributes:
        groups: None where data parallelism spans all ranks.
        progress: `Watchdog.progress`, to be called all along a run.
        rank_map: which ranks are on which host, in words; on rank 0, of several.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    groups: Groups | None = None
    progress: Callable[..., None] = _unwatched
    rank_map: str = ""

    @property
    def tensor_rank(self) -> int:
        return self.groups.tensor.rank() if self.groups else 0

    @property
    def tensor_ranks(self) -> int:
        return self.groups.tensor.size() if self.groups else 1

    @property
    def stage(self) -> int:
        return self.groups.pipeline.rank() if self.groups else 0

    @property
    def stages(self) -> int:
        return self.groups.pipeline.size() if self.groups else 1

    @property
    def data_rank(self) -> int:
        return self.groups.data.rank() if self.groups else self.rank

    @property
    def data_ranks(self) -> int:
        return self.groups.data.size() if self.groups else self.world_size

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """None is the group of all ranks, as torch takes it."""
        return self.groups.data if self.groups else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.stages - 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float64 vector over the data-parallel ranks, known to all ranks afterwards.

        Each model copy counts once, with what its last stage gives, where the losses are.
        """
        counts = self.is_last_stage and self.tensor_rank == 0
        return self._reduce(values if counts else np.zeros_like(values), dist.ReduceOp.SUM)

    def any(self, flags: np.ndarray) -> np.ndarray:
        """Which of a few flags (0 or 1) are set on any rank at all."""
        return self._reduce(flags, dist.ReduceOp.MAX)

    def _reduce(self, values: np.ndarray, operation: dist.ReduceOp.RedOpType) -> np.ndarray:
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(self.device)
        dist.all_reduce(tensor, op=operation)
        return tensor.cpu().numpy()

    def gather(self, value: object) -> list:
        """One small picklable object from each rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_numbers(self, values: np.ndarray) -> np.ndarray:
        """A small float64 vector from each rank, as rows of a matrix on every rank; as fast as a sum."""
        rows = np.zeros((self.world_size, len(values)))
        rows[self.rank] = values
        return self._reduce(rows, dist.ReduceOp.SUM)

    def arranged(self, parallel: ParallelConfig) -> Mesh:
        """This mesh with the groups of a layout. Collective; the groups of an earlier layout are dropped."""
        if parallel.tensor == parallel.pipeline == 1:
            return dataclasses.replace(self, groups=None)
        from megatron.core import parallel_state  # seconds to import, and only these layouts need it

        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=math.ceil(_PATIENCE * parallel.timeout_s / 60),
        )
        groups = Groups(
            tensor=parallel_state.get_tensor_model_parallel_group(),
            data=parallel_state.get_data_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            model=parallel_state.get_model_parallel_group(),
        )
        return dataclasses.replace(self, groups=groups)


def _allow_files(ranks: int) -> None:
    """As many open files as this process may have: each connection of rank 0's store and of gloo is one, and the
    usual limit of 1024, which a process may raise by itself, is too small for some hundred ranks.

    Raises:
        UserError: it may have too few; torch would say so in a traceback, from the middle of the start.
    """
    needed = _FILES + _FILES_PER_RANK * ranks
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{ranks} ranks need about {needed} open files a process, and at most {hard} are allowed: raise "
            "`ulimit -n`"
        )
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def connected(
    launch: Launch,
    timeout_s: float = ParallelConfig.timeout_s,
    hangs_folder: Path | None = None,
    on_hang: Callable[[Verdict], None] | None = None,
) -> Iterator[Mesh]:
    """Join the process group (NCCL where this process has a GPU, gloo elsewhere), under a watchdog.

    Args:
        timeout_s: how long to wait for ranks that do not come, and for ranks that come no further.
        hangs_folder: where stacks are written if some rank hangs.
        on_hang: see `Watchdog`.

    Raises:
        UserError: some ranks did not come; they are named.
        HungRankError: a collective failed because of the ranks that it names.
    """
    _allow_files(launch.world_size)
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, gpu = torch.device("cpu"), ""
        backend = "gloo"
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        # What DeepSpeed selects its device by; a task that sees one GPU only has device 0.
        LOCAL_RANK=str(device.index if device.type == "cuda" else launch.local_rank),
        MASTER_ADDR=launch.master_address,
        MASTER_PORT=str(launch.master_port),
    )
    store = join(launch, timeout_s, gpu)
    with Watchdog(launch, store, timeout_s, hangs_folder, on_hang) as watchdog:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("process-group", store),
            rank=launch.rank,
            world_size=launch.world_size,
            # It does not know a slow rank from a hung one: the watchdog comes first.
            timeout=timedelta(seconds=_PATIENCE * timeout_s),
        )
        yield Mesh(
            launch.rank,
            launch.world_size,
            launch.local_rank,
            device,
            progress=watchdog.progress,
            rank_map=rank_map(store, launch.world_size) if launch.rank == 0 and launch.world_size > 1 else "",
        )
        # Not after an error: with NCCL it may wait for the others and hide the error.
        dist.destroy_process_group()
