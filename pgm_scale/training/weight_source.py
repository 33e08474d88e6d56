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
from pgm_scale.errors import UserError
from pgm_scale.model_folder import is_model_folder, read_description, read_weights
from pgm_scale.run_folder import RunFolder, checkpoint_sha256
from pgm_scale.trained_model import ModelDescription, Origin, Weights

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
        if weights != "ema" and description.origin.weights != weights:
            raise UserError(f"{folder} holds {description.origin.weights} weights only; give the run instead")
        return WeightSource(description, "weight", lambda wanted: _read_folder(folder, wanted))
    run = RunFolder(folder)
    config, identity = run.config(), run.identity()
    store = CheckpointStore(run.path, peers)
    step = store.newest_verified(repair=False)
    if step is None:
        raise UserError(f"{run.path} has no checkpoint yet; train it first (pgm-scale train)")
    kind: Weights = weights if weights in store.kinds(step) else "weight"
    origin = Origin(config.name, identity.run_id, step, kind, checkpoint_sha256(store, step))
    return WeightSource(run.description(origin), kind, lambda wanted: store.read(step, wanted))


def _read_folder(folder: str | Path, wanted: Wanted) -> dict[TensorKey, list[torch.Tensor]]:
    tensors = read_weights(folder)
    problems = [
        f"{name}: the model has {wanted_shape}, the folder {found and tuple(found.shape)}"
        for (_, name), (wanted_shape, _) in wanted.items()
        if (found := tensors.get(name)) is None or tuple(found.shape) != wanted_shape
    ] + [f"{name}: unknown to the model" for name in tensors.keys() - {name for _, name in wanted}]
    if problems:
        raise UserError(f"{folder} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    return {
        key: [part.take(tensors[key[1]])[start : start + length].float() for part, start, length in ranges]
        for key, (_, ranges) in wanted.items()
    }
