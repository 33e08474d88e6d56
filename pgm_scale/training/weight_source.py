"""Weights of another run or of an exported folder, for ranks that each want their part of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pgm_scale.checkpoint.fragments import Kind, TensorKey
from pgm_scale.checkpoint.peers import Peers
from pgm_scale.checkpoint.reader import Wanted
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.loading import check_origin
from pgm_scale.model_folder import check_shapes, is_model_folder, read_description, read_weights
from pgm_scale.run_folder import RunFolder, choose_checkpoint
from pgm_scale.trained_model import ModelDescription, Weights

ReadRanges = Callable[[Wanted], dict[TensorKey, list[torch.Tensor]]]


@dataclass(frozen=True)
class WeightSource:
    """`read` gives ranges of fp32 values as `CheckpointStore.read` does, under keys of `kind`."""

    description: ModelDescription
    kind: Kind
    read: ReadRanges


def open_weights(folder: str | Path, weights: Weights, peers: Peers) -> WeightSource:
    """The newest good checkpoint of a run, in any layout, or an exported folder. Collective.

    `ema` falls back to the weights of a run without an average.

    Raises:
        UserError: neither of them, a damaged one, or raw weights asked of the export of averaged ones.
    """
    if is_model_folder(folder):
        description = read_description(folder)
        check_origin(folder, description.origin, None, weights)
        return WeightSource(description, "weight", lambda wanted: _read_folder(folder, wanted))
    run = RunFolder(folder)
    store = CheckpointStore(run.path, peers)
    step, origin = choose_checkpoint(run, store, None, weights)
    return WeightSource(run.description(origin), origin.weights, lambda wanted: store.read(step, wanted))


def _read_folder(folder: str | Path, wanted: Wanted) -> dict[TensorKey, list[torch.Tensor]]:
    """Every rank reads the whole folder and keeps its ranges."""
    tensors = read_weights(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes({name: shape for (_, name), (shape, _) in wanted.items()}, shapes, str(folder))
    return {
        key: [part.take(tensors[key[1]])[start : start + length].float() for part, start, length in ranges]
        for key, (_, ranges) in wanted.items()
    }
