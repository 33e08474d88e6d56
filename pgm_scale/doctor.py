"""`pgm-scale doctor`: what this machine has, and whether a configuration's data and folders are sound."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pgm_scale import __version__
from pgm_scale import config as configuration
from pgm_scale.config import OptimizerConfig, ParallelConfig, RunConfig
from pgm_scale.data.batch import ShardRows
from pgm_scale.data.manifest import Shard
from pgm_scale.data.readers import read_shard
from pgm_scale.data.storage import SplitStorage, open_splits
from pgm_scale.errors import UserError
from pgm_scale.holder import node_name
from pgm_scale.parallel.launch import Launch, find_launch
from pgm_scale.parallel.layout import layout_problems
from pgm_scale.parallel.mesh import connected
from pgm_scale.parallel.optimizer import build_adamw
from pgm_scale.preflight.setup import setup_problems
from pgm_scale.preflight.versions import MISSING, nccl_version, package_versions
from pgm_scale.training.teacher_model import fill_in_model


def examine(config_path: str | None, overrides: Iterable[str]) -> None:
    """Print a table of this machine and, under a launcher, of all ranks; then check a configuration.

    Raises:
        UserError: everything that is wrong, at once.
    """
    launch = find_launch()
    problems: list[str] = []
    check = partial(layout_problems, world_size=launch.world_size)
    config = configuration.load(config_path, overrides, check, fill_in_model) if config_path else None
    ranks = _rank_map(launch, config.parallel if config else ParallelConfig())
    if launch.rank == 0:
        table = Table("what", "found", box=None, pad_edge=False)
        for name, found in _machine(ranks, problems):
            table.add_row(name, found)
        Console().print(table)
        if config is not None:
            problems += _check_config(config)
    if problems:
        raise UserError(f"doctor found {len(problems)} problem(s):\n  " + "\n  ".join(problems))
    if launch.rank == 0:
        print("no problems found")


def _machine(ranks: list[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    yield "pgm-scale", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package, version in package_versions().items():
        yield package, version
        if version == MISSING:
            problems.append(f"{package} is not installed; run make test, or pip install pgm-scale")
    yield "processors", f"{os.cpu_count()} (torch uses {torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield "CUDA, NCCL", f"{torch.version.cuda}, {nccl_version()}"
    else:
        yield "GPU", "none: training runs on the CPU with gloo"
    yield "optimizer", _optimizer()
    yield "C++ compiler", shutil.which("g++") or shutil.which("c++") or "none found"
    for line in ranks:
        yield "rank map", line


def _optimizer() -> str:
    """The AdamW that training would use, found by making one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameter = torch.nn.Parameter(torch.zeros(1, device=device))
    kind = type(build_adamw([parameter], OptimizerConfig(), device))
    apex = "NVIDIA Apex" if kind.__module__.startswith("apex.") else "torch, fused; no NVIDIA Apex in use"
    return f"{kind.__name__} ({apex})"


def _rank_map(launch: Launch, parallel: ParallelConfig) -> list[str]:
    """One line a rank with its place in the layout; alone, no process group is made."""
    if launch.source == "single":
        return ["single process (torchrun or srun would be seen here)"]
    with connected(launch, parallel.timeout_s) as connection:
        mesh = connection.arranged(parallel)
        place = f"tensor {mesh.tensor_rank}, data {mesh.data_rank}, stage {mesh.stage}"
        lines = mesh.gather(
            f"rank {mesh.rank}: {node_name()} {mesh.device} (local rank {mesh.local_rank}; {place})"
        )
    return [f"{launch.source}, {launch.world_size} ranks, master {launch.master_address}", *lines]


def _check_config(config: RunConfig) -> list[str]:
    problems: list[str] = []
    data = config.data
    splits = open_splits(data.train, data.validation, data.cache_folder, problems)
    for split in splits:
        problems += _shard_problems(split)
    return problems + setup_problems(config, splits)


def _read(split: SplitStorage, shard: Shard) -> ShardRows:
    return read_shard(split.shard_path(shard), shard, split.manifest)


def _shard_problems(split: SplitStorage) -> Iterator[str]:
    """Hashes, and then what is in the shards: a shard whose hash is right may hold ids beyond the vocabulary."""
    checks: list[Callable[[], object]] = [
        split.tokenizer_path,
        *(partial(_read, split, shard) for shard in split.manifest.shards),
    ]
    for check in track(checks, f"reading {split.split}", console=Console(file=sys.stderr)):
        try:
            check()
        except UserError as error:
            yield str(error)
