"""Being any rank of any layout in one process: no peers, no GPU, tensors without storage.

Process groups are torch's fake ones, whose collectives return at once; tensors are on the meta device, which
computes shapes only. So the model's and Megatron's own code runs as on a cluster, in milliseconds a block.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pgm_scale.config import ParallelConfig
from pgm_scale.models.layers import PositionTable
from pgm_scale.parallel.mesh import Mesh

META = torch.device("meta")


@contextmanager
def pretended_rank(parallel: ParallelConfig, world_size: int, rank: int = 0) -> Iterator[Mesh]:
    """The mesh as `rank` of `world_size` sees it, on the meta device. Not inside a distributed run."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process is a rank of a real run"
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with _as_on_a_gpu():
            yield Mesh(rank, world_size, rank, META).arranged(parallel)
    finally:
        if "megatron.core.parallel_state" in sys.modules:
            sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Megatron's "current GPU" is the meta device, and torch picks the kernels that a GPU would run.

    On the meta device torch composes dropout, RMS norm and attention of small operations, which keep other tensors.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # misses CUDA's runtime
    with (
        mock.patch("torch.cuda.current_device", return_value=META),
        mock.patch("torch.is_autocast_enabled", return_value=False),  # refuses the name of the meta device
        mock.patch.object(PositionTable, "fill", _fill_nothing),
        mock.patch("torch.nn.functional.dropout", _dropout),
        mock.patch("torch.nn.functional.rms_norm", _rms_norm),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash_attention),
        mock.patch.dict(os.environ, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),  # or Megatron advises it
        warnings.catch_warnings(action="ignore"),
    ):
        yield


def _fill_nothing(table: PositionTable, device: torch.device) -> None:
    """The shapes of `PositionTable.fill`, which computes on the CPU and takes longer than all the rest."""
    for name in ("cos_LK", "sin_LK"):
        table.register_buffer(name, torch.empty(table.length, table.size // 2, device=META), persistent=False)


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _rms_norm(x: torch.Tensor, normalized_shape: Any, weight: None = None, eps: float = 0.0) -> torch.Tensor:
    assert weight is None
    return _FusedRMSNorm.apply(x)


class _FusedRMSNorm(torch.autograd.Function):
    """One kernel each way, which reads and writes as much as a product, and keeps the input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        factors = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, factors)
        return x * x.new_empty(())

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> torch.Tensor:
        x, _ = ctx.saved_tensors
        return d_y * x


def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    """A mask changes no shape, so it is dropped."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
