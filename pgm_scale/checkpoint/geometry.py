"""Flat ranges of shards as rectangles of the whole tensor, so that any layout's pieces meet any other's.

A whole tensor is laid on a grid: flattened row-major and cut in rows of one stride, the same for all shards of
the tensor that are not contiguous in it. A flat range of such a shard, and of the whole tensor too, is at most
three rectangles of the grid: the rest of a row, full rows, the beginning of a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pgm_scale.tensor_slices import TensorSlice


class Sliceable(Protocol):
    """A 1-D tensor, or safetensors' view of one in a file."""

    def __getitem__(self, part: slice, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Box:
    """Rows [top, bottom) x columns [left, right) of a grid; never empty."""

    top: int
    bottom: int
    left: int
    right: int

    def common(self, other: Box) -> Box | None:
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Box(top, bottom, left, right) if top < bottom and left < right else None


@dataclass(frozen=True)
class Region:
    """The flat range [start, start + length) of a matrix that is the columns [offset, offset + run) of a grid."""

    offset: int
    run: int
    start: int
    length: int

    @classmethod
    def of(cls, slice_: TensorSlice, start: int, length: int, stride: int) -> Region:
        """A flat range of a shard, on the grid with rows of `stride`: its own, or any if it is contiguous."""
        if slice_.is_contiguous:
            return cls(0, stride, slice_.offset + start, length)
        assert slice_.stride == stride, (slice_, stride)
        return cls(slice_.offset, slice_.run, start, length)

    def boxes(self) -> Iterator[Box]:
        """The one to three rectangles of the range, in its order; none if it is empty."""
        if self.length == 0:
            return
        end = self.start + self.length
        first_row_end = min(-(-self.start // self.run) * self.run, end)
        last_row_start = max(end // self.run * self.run, first_row_end)
        for low, high in itertools.pairwise((self.start, first_row_end, last_row_start, end)):
            if low < high:
                top, left = low // self.run, self.offset + low % self.run
                rows = max(1, (high - low) // self.run)
                yield Box(top, top + rows, left, left + min(high - low, self.run))

    def cut(self, values: Sliceable, box: Box) -> torch.Tensor:
        """The box `[rows, columns]` as a view of the range's values: a contiguous 1-D tensor, or one in a file."""
        first = self._position(box.top, box.left)
        last = self._position(box.bottom - 1, box.right - 1)
        rows, columns = box.bottom - box.top, box.right - box.left
        return values[first : last + 1].as_strided((rows, columns), (self.run, 1))

    def _position(self, row: int, column: int) -> int:
        return row * self.run + column - self.offset - self.start


def grid_stride(shape: Sequence[int], slices: Iterable[TensorSlice]) -> int:
    """Length of the grid's rows on which all these shards of one tensor lie.

    Raises:
        ValueError: they were cut in two ways, and neither is contiguous.
    """
    strides = {slice_.stride for slice_ in slices if not slice_.is_contiguous} or {math.prod(shape)}
    if len(strides) > 1:
        raise ValueError(f"its shards are cut in rows of {sorted(strides)} elements")
    return strides.pop()


@dataclass(frozen=True)
class Fault:
    """A part of a grid's row that no box has (`missing`), or that two have."""

    box: Box
    missing: bool


def first_fault(boxes: Iterable[Box], rows: int, stride: int) -> Fault | None:
    """The first place where boxes do not tile a grid of `rows` x `stride`; None when they tile it.

    Between two rows where a box begins or ends nothing changes, so one row of each such band is walked:
    O(n log n) for n boxes, times the few boxes that stand side by side in tensor-parallel layouts.
    """
    waiting = sorted(boxes, key=lambda box: box.top, reverse=True)
    active: list[Box] = []
    top = 0
    while top < rows:
        while waiting and waiting[-1].top == top:
            active.append(waiting.pop())
        active.sort(key=lambda box: box.left)
        fault = _row_fault(active, top, stride)
        if fault:
            return fault
        top = min([box.bottom for box in active] + [box.top for box in waiting[-1:]])
        active = [box for box in active if box.bottom > top]
    return None


def _row_fault(active: list[Box], row: int, stride: int) -> Fault | None:
    """The first fault in a row that the active boxes, sorted by column, cross."""
    end = 0
    for box in active:
        if box.left < end:
            return Fault(Box(row, row + 1, box.left, min(end, box.right)), missing=False)
        if box.left > end:
            return Fault(Box(row, row + 1, end, box.left), missing=True)
        end = box.right
    return Fault(Box(row, row + 1, end, stride), missing=True) if end < stride else None
