"""The health of this rank's GPU, as nvidia-smi tells it. A machine without GPUs has one row that says so."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence

import torch

from pgm_scale.preflight.rows import Row, Status

Query = Callable[[Sequence[str]], str]  # fields to what nvidia-smi prints for them
COMMAND_TIMEOUT_S = 30.0

# The names of newer and older drivers; one that is unknown to the driver is left out.
_FIELDS = (
    "temperature.gpu",
    "clocks.sm",
    "clocks.max.sm",
    "clocks_event_reasons.active",
    "clocks_throttle_reasons.active",
    "ecc.errors.uncorrected.volatile.total",
    "ecc.errors.corrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
_HOT_C = 87.0
_UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field')
# NVML's bits of what holds the clocks down. A power cap is normal under load.
_BAD_REASONS = {0x08: "hardware slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake"}
_POOR_REASONS = {0x20: "software thermal slowdown"}
_DRAIN = "drain the node, reset the GPU (nvidia-smi --gpu-reset) or have it replaced"


def gpu_rows(device: torch.device, ranks_here: int, query: Query | None = None) -> Iterator[Row]:
    """Ask after matrix products, while the GPU is still warm from them."""
    if device.type != "cuda":
        if shutil.which("nvidia-smi") and query is None:
            yield _unused_gpus()
        else:
            yield Row("GPU", "none")
        return
    properties = torch.cuda.get_device_properties(device)
    yield Row("GPU", properties.name)
    yield _memory(device)
    if torch.cuda.device_count() > ranks_here:
        count = torch.cuda.device_count()
        to_do = "start one task per GPU (srun --ntasks-per-node)"
        yield Row("tasks", f"{ranks_here} for {count} GPUs", "warning", to_do)
    yield from health_rows(query or nvidia_smi(f"GPU-{properties.uuid}"))


def _unused_gpus() -> Row:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        listed = ""
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    if count == 0:
        return Row("GPU", "none")
    to_do = "install a torch build that fits the driver, and see that CUDA_VISIBLE_DEVICES is not empty"
    return Row("GPU", f"nvidia-smi lists {count}, torch finds none", "bad", to_do)


def _memory(device: torch.device) -> Row:
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    others_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
    value = f"{free_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB free"
    if others_bytes < 0.1 * total_bytes:  # a CUDA context and NCCL take one or two GiB of it
        return Row("GPU memory", value, number=free_bytes)
    to_do = "end the processes that nvidia-smi lists on it; another rank may share this GPU"
    return Row("GPU memory", value, "bad", to_do, free_bytes)


def nvidia_smi(uuid: str) -> Query:
    """Asks for one GPU. What it prints for an unknown field is its complaint."""

    def ask(fields: Sequence[str]) -> str:
        command = [
            "nvidia-smi",
            "-i",
            uuid,
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
        return done.stdout + done.stderr

    return ask


def health_rows(query: Query) -> Iterator[Row]:
    """One row for each part of a GPU's health that the driver tells."""
    try:
        values = _values(query)
    except (OSError, subprocess.SubprocessError) as error:
        yield Row(
            "GPU health", f"nvidia-smi: {type(error).__name__}", "warning", "run nvidia-smi on the node"
        )
        return
    if not values:
        yield Row("GPU health", "nvidia-smi tells nothing", "warning", "run nvidia-smi on the node")
    if (temperature := _number(values, "temperature.gpu")) is not None:
        status: Status = "ok" if temperature < _HOT_C else "warning"
        yield Row("temperature", f"{temperature:.0f} C", status, "look at the node's cooling", temperature)
    if (clock := _number(values, "clocks.sm")) is not None:
        yield Row("clocks", f"{clock:.0f} of {values.get('clocks.max.sm', '?')} MHz", number=clock)
    yield from _throttling(values)
    for name, label in (
        ("ecc.errors.uncorrected.volatile.total", "uncorrected ECC errors"),
        ("remapped_rows.pending", "memory rows to be remapped"),
        ("remapped_rows.failure", "memory rows that could not be remapped"),
    ):
        text = values.get(name, "")
        if text.lower() == "yes" or (_number(values, name) or 0) > 0:
            yield Row("GPU memory errors", f"{label}: {text}", "bad", _DRAIN)
    if corrected := _number(values, "ecc.errors.corrected.volatile.total"):
        yield Row("ECC, corrected", f"{corrected:.0f}", number=corrected)


def _throttling(values: dict[str, str]) -> Iterator[Row]:
    text = values.get("clocks_event_reasons.active") or values.get("clocks_throttle_reasons.active") or ""
    try:
        bits = int(text, 16)
    except ValueError:
        return
    bad = [reason for bit, reason in _BAD_REASONS.items() if bits & bit]
    poor = [reason for bit, reason in _POOR_REASONS.items() if bits & bit]
    if bad:
        yield Row("throttling", ", ".join(bad + poor), "bad", "look at the node's power supply and cooling")
    elif poor:
        yield Row("throttling", ", ".join(poor), "warning", "look at the node's cooling")
    else:
        yield Row("throttling", "none")


def _values(query: Query) -> dict[str, str]:
    """Field to text of all fields that the driver knows and this GPU has."""
    fields = list(_FIELDS)
    while fields:
        text = query(fields)
        unknown = _UNKNOWN_FIELD.search(text)
        if unknown is None or unknown.group(1) not in fields:
            break
        fields.remove(unknown.group(1))
    else:
        return {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(fields):
            return {
                name: cell
                for name, cell in zip(fields, cells, strict=True)
                if cell and not cell.startswith("[")  # [N/A], [Not Supported]
            }
    return {}


def _number(values: dict[str, str], name: str) -> float | None:
    try:
        return float(values[name])
    except (KeyError, ValueError):
        return None
