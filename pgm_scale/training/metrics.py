"""What a run reports: a JSON object a logged step, console lines or a live bar, and the tracker."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pgm_scale.files import atomic_write_bytes, check_regular, finite

logger = logging.getLogger(__name__)

# Dense bf16 FLOP/s from NVIDIA's data sheets, by a part of the device's name (of the SXM modules).
_PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100-SXM": 312e12, "A100-PCIE": 312e12}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak bf16 FLOP/s of a known GPU; None elsewhere and in fp32: MFU is reported only where it is known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK_FLOPS.items() if model in name), None)


def memory_bytes(device: torch.device) -> int:
    """Peak allocated on this GPU, or the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class MetricsFile:
    """`metrics.jsonl`: appended and flushed record by record, cut back to the checkpoint on a resume."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._open(first_step)

    def rewind(self, first_step: int) -> None:
        """Drop records after `first_step` finished steps: the run writes them again."""
        self.close()
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        path, kept = self._path, []
        if path.exists():
            check_regular(path)
            for line in path.read_bytes().splitlines():
                try:
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # the last line of a killed run may be cut
        atomic_write_bytes(path, b"".join(kept))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, record: dict[str, Any]) -> None:
        """Append a record. What cannot be written (a full disk) is kept and tried again with the next one."""
        was_full = bool(self._unwritten)
        self._unwritten += json.dumps(finite(record)).encode() + b"\n"
        size_bytes = self._file.seek(0, os.SEEK_END)
        try:
            done_bytes = self._file.write(self._unwritten)
            if done_bytes != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = b""
        except OSError as error:
            self._file.truncate(size_bytes)  # no half line, for those who read it meanwhile
            if not was_full:
                logger.warning("%s cannot be written (%s); its records are kept", self._path, error.strerror)

    def close(self) -> None:
        self._file.close()


class Throughput:
    """Tokens and seconds since the last record, without the time of validations and saves."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start_s = time.perf_counter()
        self._paused_s = 0.0
        self.tokens = 0

    def exclude(self, seconds: float) -> None:
        self._paused_s += seconds

    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, time.perf_counter() - self._start_s - self._paused_s)


class ConsoleReport:
    """A live bar on a terminal, a line a record elsewhere; silent on all ranks but the first."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool) -> None:
        self._enabled = enabled
        self._console = Console(stderr=True)
        self._live = enabled and sys.stderr.isatty()
        self._total_steps = total_steps
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[report]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=first_step, report="")
        self._progress.start()

    def step(self, step: int) -> None:
        if self._live:
            self._progress.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        if not self._enabled:
            return
        loss = record["loss_mean"]
        text = (
            f"loss {f'{loss:.3f}' if math.isfinite(loss) else '-'}  grad {record['gradient_norm']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tok/s"
        )
        if record["mfu"] is not None:
            text += f"  MFU {record['mfu']:.1%}"
        if self._live:
            self._progress.update(self._task, report=text)
        else:
            self.say(f"step {record['step']}/{self._total_steps}  {text}")

    def say(self, line: str) -> None:
        if self._enabled:
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
