"""Which micro-batches a bad gradient comes from, found by computing them again, each for itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.micro_step import MicroStep


def have_bad_gradients(engine: Engine, steps: Iterable[MicroStep]) -> list[bool]:
    """Of each of this rank's micro-batches: whether its own gradient is not finite. The engine's stay untouched.

    Takes a forward and a backward pass, and memory for the gradients. Empty where it cannot be told: of a model
    that several ranks share (one that fails here would leave the others waiting), and where memory runs out.
    """
    if engine.zero_stage == 3 or engine.mesh.groups is not None:
        return []
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    found = []
    try:
        for step in steps:
            step.begin()
            loss = step.loss(engine.module(*step.arguments, readout=step.readout))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            found.append(not all(bool(g.isfinite().all()) for g in gradients if g is not None))
            del gradients, loss
    except torch.OutOfMemoryError:
        return []
    return found
