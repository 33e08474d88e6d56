"""CUDA graphs of the steps of a sampler: one launch a step instead of some hundred kernels.

A step's shape tells how many tokens it reads and draws, and it comes back with every batch of the same size. The
first time it runs as it is (which also sets up the libraries), the second time it is captured, and from there on
replayed. It pays where a step is shorter than its launches: small batches, small models. What a captured step reads
and writes must stay where it is, and it must not ask the device for anything. On a CPU there is nothing to launch,
and a step is simply called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class StepGraphs:
    """The graphs of steps that work on the same buffers; they share one memory pool, because they run in turn."""

    def __init__(self, device: torch.device, capturable: bool = True):
        self.capturable = capturable and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None

    def run(self, shape: Hashable, step: Callable[[], None]) -> None:
        """Run the step, or the graph of the step that had this shape before."""
        if not self.capturable or shape not in self._graphs:
            self._graphs[shape] = None
            step()
            return
        graph = self._graphs[shape] or self._capture(step)
        self._graphs[shape] = graph
        graph.replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        self._pool = graph.pool()
        return graph
