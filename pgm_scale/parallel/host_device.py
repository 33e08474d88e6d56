"""Megatron-core on a machine without GPUs: what it asks of "cuda" is done on the CPU, where gloo does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _OnHost(TorchFunctionMode):
    """Tensors that are made on device "cuda" are made on the CPU."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = torch.device("cpu")
        return function(*args, **options)


@contextmanager
def megatron_device(needed: bool = True) -> Iterator[None]:
    """Around calls of Megatron's schedule and layers; does nothing on a machine with a GPU."""
    if torch.cuda.is_available() or not needed:
        yield
        return
    with (
        mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")),
        mock.patch("torch.cuda.synchronize", return_value=None),
        _OnHost(),
    ):
        yield
