"""What has to be the same on all nodes of a run: packages, this code, drivers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import pgm_scale

PACKAGES = (
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
    "pillow",
)
MISSING = "MISSING"


def package_versions() -> dict[str, str]:
    """Installed versions by package, `MISSING` where there is none."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = MISSING
    return versions


def nccl_version() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


def rank_versions(device: torch.device) -> dict[str, str]:
    """Everything that must be equal on all ranks, by name. The driver's is asked of the kernel, not of a GPU."""
    versions = {"pgm-scale": pgm_scale.__version__, "pgm-scale's code": _code_sha256()[:12]}
    versions |= {"python": platform.python_version(), "kernel": platform.release()} | package_versions()
    versions |= {"processors": f"{os.cpu_count()} x {platform.machine()}", "device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        versions |= {"CUDA": str(torch.version.cuda), "NCCL": nccl_version(), "driver": _driver_version()}
    return versions


def _code_sha256() -> str:
    """Of the package's own files: two checkouts can have one version. Some 10 ms."""
    root = Path(pgm_scale.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        return found.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
