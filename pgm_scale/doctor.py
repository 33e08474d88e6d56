"""`pgm-scale doctor`: what this machine has, and whether a configuration's data and folders are sound."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pgm_scale import __version__
from pgm_scale import config as configuration
from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.parallel.mesh import Launch, Mesh, connect, disconnect, find_launch, layout_problems

_PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "mosaicml-streaming",
    "webdataset",
    "safetensors",
    "tokenizers",
    "transformers",
    "wandb",
    "submitit",
    "numpy",
)

_MINIMUM_FREE_BYTES = 1 << 30


def examine(config_path: str | None, overrides: Iterable[str]) -> None:
    """Print a table of this machine and, under a launcher, of all ranks; then check a configuration.

    Raises:
        UserError: everything that is wrong, at once.
    """
    launch = find_launch()
    problems: list[str] = []
    ranks = _rank_map(launch, problems)
    config = configuration.load(config_path, overrides) if config_path else None
    if launch.rank == 0:
        table = Table("what", "found", box=None, pad_edge=False)
        for name, found in _machine(ranks, problems):
            table.add_row(name, found)
        Console().print(table)
        if config is not None:
            problems += _check_config(config, launch)
    if problems:
        raise UserError(f"doctor found {len(problems)} problem(s):\n  " + "\n  ".join(problems))
    if launch.rank == 0:
        print("no problems found")


def _machine(ranks: list[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    yield "pgm-scale", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "MISSING"
            problems.append(f"{package} is not installed; run make test, or pip install pgm-scale")
    yield "processors", f"{os.cpu_count()} (torch uses {torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield "CUDA, NCCL", f"{torch.version.cuda}, {'.'.join(map(str, torch.cuda.nccl.version()))}"
    else:
        yield "GPU", "none: training runs on the CPU with gloo"
    yield "NVIDIA Apex", _apex()
    yield "C++ compiler", shutil.which("g++") or shutil.which("c++") or "none found"
    for line in ranks:
        yield "rank map", line


def _apex() -> str:
    if importlib.util.find_spec("apex") is None:
        return "not installed: torch's fused AdamW is used"
    from pgm_scale.parallel.optimizer import apex_fused_adam

    if apex_fused_adam() is None:
        return "a package called apex is installed, but it is not NVIDIA's: torch's fused AdamW is used"
    return "apex.optimizers.FusedAdam is used on GPUs"


def _rank_map(launch: Launch, problems: list[str]) -> list[str]:
    """One line a rank; alone, no process group is made."""
    if launch.source == "single":
        return ["single process (torchrun or srun would be seen here)"]
    mesh: Mesh = connect(launch)
    lines = mesh.gather(f"rank {mesh.rank}: {platform.node()} {mesh.device} (local rank {mesh.local_rank})")
    disconnect()
    devices = [line.split(": ", 1)[1].split(" (")[0] for line in lines]
    if torch.cuda.is_available() and len(set(devices)) < len(devices):
        problems.append("two ranks share a GPU; start one task per GPU")
    return [f"{launch.source}, {launch.world_size} ranks, master {launch.master_address}", *lines]


def _check_config(config: RunConfig, launch: Launch) -> list[str]:
    problems = layout_problems(config, launch.world_size)
    for path in (config.data.train, config.data.validation):
        try:
            storage = SplitStorage(path, config.data.cache_folder)
            storage.tokenizer_path()
        except UserError as error:
            problems.append(str(error))
            continue
        for shard in track(storage.manifest.shards, f"hashing {path}", console=Console(file=sys.stderr)):
            try:
                storage.shard_path(shard)
            except UserError as error:
                problems.append(str(error))
    problem = _folder_problem(Path(config.folder))
    return problems + ([problem] if problem else [])


def _folder_problem(folder: Path) -> str | None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return f"folder: {existing} cannot be written; choose another run folder"
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < _MINIMUM_FREE_BYTES:
        return f"folder: only {free_bytes / 2**20:.0f} MiB are free at {existing}; make room for checkpoints"
    return None
