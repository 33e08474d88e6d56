"""What one forward and backward pass keeps in memory, computes and sends, read off the operations themselves.

`Trace` sees every operation that torch dispatches, those of autograd's backward pass and Megatron's included.
Memory is exact up to what kernels use inside and the allocator rounds; time is each kernel's own bound (a
roofline: the slower of its operations and its bytes) and nothing overlaps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgm_scale.planning.cluster import Hardware


class Quantities:
    """A dataclass of numbers that adds and scales like a vector."""

    def _combine(self, other: Self, own: float, others: float) -> Self:
        values = {}
        for spec in fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, spec.name), getattr(other, spec.name)
            if isinstance(mine, Quantities):
                values[spec.name] = mine._combine(theirs, own, others)
            else:
                values[spec.name] = own * mine + others * theirs
        return type(self)(**values)

    def __add__(self, other: Self) -> Self:
        return self._combine(other, 1, 1)

    def __sub__(self, other: Self) -> Self:
        return self._combine(other, 1, -1)

    def __mul__(self, factor: float) -> Self:
        return self._combine(self, factor, 0)


@dataclass
class Work(Quantities):
    """What a pass computes and sends.

    Attributes:
        matmul_flops: of matrix products.
        attention_flops_per_key: of attention, for each key that a query reads: the trace does not know how many.
        kernel_s: time of all kernels, one after the other, but for attention's arithmetic.
        kernels: how many are launched.
        reduced_bytes, gathered_bytes: of tensor-parallel collectives: sizes of all-reduced tensors, and of the
            whole tensors that are gathered or reduced and scattered.
        collectives: how many there are.
    """

    matmul_flops: float = 0.0
    attention_flops_per_key: float = 0.0
    kernel_s: float = 0.0
    kernels: float = 0.0
    reduced_bytes: float = 0.0
    gathered_bytes: float = 0.0
    collectives: float = 0.0


@dataclass
class Footprint(Quantities):
    """A forward and a backward pass.

    Attributes:
        held_bytes: alive between the two, beyond what was there before: what the graph keeps, and the result.
        extra_bytes: alive on top of that at the worst moment of either pass.
    """

    held_bytes: float = 0.0
    extra_bytes: float = 0.0
    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)


class Trace(TorchDispatchMode):
    """Counts while it is active. What is used before it was made was there before."""

    def __init__(self, hardware: Hardware, precision: str) -> None:
        super().__init__()
        self._bytes_per_s = hardware.memory_bytes_per_s * hardware.memory_fraction
        self._flops_per_s = hardware.peak(precision) * hardware.matmul_fraction
        self.work = Work()
        self.live_bytes = self.peak_bytes = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._watch(tensor, 0)
        result = function(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        is_new = [self._watch(tensor, tensor.untyped_storage().nbytes()) for tensor in outputs]
        if function.namespace == "c10d":
            self._count_collective(function, inputs)
        elif any(is_new) or function._schema.is_mutable:
            read = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]  # without an `out`
            self._count_kernel(function, read, outputs)
        return result

    def _watch(self, tensor: Tensor, size_bytes: int) -> bool:
        """Whether this storage is new; it counts as alive until nothing refers to it any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return False

        def freed(_: Any) -> None:
            del self._storages[key]
            self.live_bytes -= size_bytes

        self._storages[key] = weakref.ref(storage, freed)
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return True

    def _count_kernel(self, function: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = function._schema.name
        flops = _matmul_flops(name, inputs)
        self.work.matmul_flops += flops
        self.work.attention_flops_per_key += _attention_flops_per_key(name, inputs)
        self.work.kernel_s += max(
            flops / self._flops_per_s, _moved_bytes(name, inputs, outputs) / self._bytes_per_s
        )
        self.work.kernels += 1

    def _count_collective(self, function: Any, tensors: list[Tensor]) -> None:
        """Every tensor of a gather or scatter is in the arguments, so the largest is the whole one."""
        size_bytes = max(_bytes(tensor) for tensor in tensors)
        if "allreduce" in function._schema.name:
            self.work.reduced_bytes += size_bytes
        else:
            self.work.gathered_bytes += size_bytes
        self.work.collectives += 1


def trace_passes(
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], None],
    hardware: Hardware,
    precision: str,
) -> Footprint:
    """A forward pass and the backward pass of its result; parameters should have gradients to add to already."""
    with Trace(hardware, precision) as trace:
        result = forward()
        held_bytes, forward_work, trace.work = trace.live_bytes, trace.work, Work()
        backward(result)
    return Footprint(held_bytes, trace.peak_bytes - held_bytes, forward_work, trace.work)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moved_bytes(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """What a kernel reads and writes once; a look-up reads only the rows it looks up."""
    if name == "aten::embedding":
        return 2 * sum(map(_bytes, outputs))
    return sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))


def _matmul_flops(name: str, inputs: list[Tensor]) -> float:
    """2 n k m of an [n, k] x [k, m] product."""
    if name not in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
        return 0.0
    left, right = inputs[-2:]
    return 2.0 * left.numel() * right.shape[-1]


def _attention_flops_per_key(name: str, inputs: list[Tensor]) -> float:
    """Two products a query and key forward; five backward, where the scores are computed again."""
    if "attn" not in name and "attention" not in name:
        return 0.0
    is_backward = "backward" in name
    queries = inputs[1] if is_backward else inputs[0]  # the gradient comes first
    return (5 if is_backward else 2) * 2.0 * queries.numel()
