"""A module's rows, measured in a process of their own."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from ops.bench.machine import Machine
from ops.bench.measure import Row
from pgm_scale.host_memory import keep_freed_memory

Result = TypeVar("Result")


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Modules must not share one: the allocator is set once, and DeepSpeed joins one process group in its life."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def module_rows(
    name: str, machine: Machine, keeps_memory: bool, first: int | None
) -> tuple[list[Row], str | None]:
    """The rows of a module, or the first few, and the error that ended it, if any."""
    if keeps_memory:
        keep_freed_memory()  # for both sides of every comparison, and before the first large tensor
    torch.set_num_threads(machine.threads)
    rows: list[Row] = []
    try:
        rows.extend(islice(importlib.import_module(f"ops.bench.{name}_rows").rows(machine), first))
    except Exception as error:  # whatever it was, the other modules still have something to say
        traceback.print_exc()
        return rows, f"{type(error).__name__}: {error}"
    return rows, None
