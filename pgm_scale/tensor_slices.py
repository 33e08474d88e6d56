"""Which elements of a whole tensor a tensor-parallel shard holds: what checkpoints and layers say to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorSlice:
    """Columns [offset, offset + run) of a whole tensor that is flattened row-major and cut in rows of `stride`.

    The shard is these columns, flattened row-major again. That covers every sharding of Megatron's layers with
    `n` tensor-parallel ranks, of which this is number `r`:

    - column-parallel weight `[O, I]` of `p` fused parts: stride O*I/p, run stride/n, offset r*run; bias: I = 1;
    - row-parallel weight `[O, I]`: stride I, run I/n, offset r*run;
    - vocabulary `[V, H]`: one row of V*H, run the rank's real rows * H; padding rows are not in the tensor.

    Args:
        global_shape: shape of the whole tensor.
        offset, run, stride: in elements; the stride divides the tensor's size. An empty shard has run 0.
    """

    global_shape: tuple[int, ...]
    offset: int
    run: int
    stride: int

    def __post_init__(self) -> None:
        assert 0 <= self.offset <= self.offset + self.run <= self.stride, self
        assert self._whole_numel % max(self.stride, 1) == 0, self
        assert self.stride > 0 or self._whole_numel == 0, self

    @classmethod
    def whole(cls, shape: Sequence[int]) -> TensorSlice:
        """All elements of a tensor: the slice of a parameter that every tensor-parallel rank holds."""
        numel = math.prod(shape)
        return cls(tuple(shape), 0, numel, numel)

    @property
    def rows(self) -> int:
        """How many runs of consecutive elements the shard has in the whole tensor."""
        return self._whole_numel // max(self.stride, 1)

    @property
    def numel(self) -> int:
        """Elements of the shard."""
        return self.rows * self.run

    @property
    def is_whole(self) -> bool:
        return self.run == self.stride

    @property
    def is_contiguous(self) -> bool:
        """The shard is one range of the flattened whole tensor: [offset, offset + numel)."""
        return self.rows <= 1 or self.is_whole or self.run == 0

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The shard's values `[numel]`, from the whole tensor; a view of it where the shard is one run."""
        assert tuple(whole.shape) == self.global_shape, (whole.shape, self)
        return whole.reshape(self.rows, self.stride)[:, self.offset : self.offset + self.run].reshape(-1)

    @property
    def _whole_numel(self) -> int:
        return math.prod(self.global_shape)
