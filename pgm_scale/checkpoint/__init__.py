"""Checkpoints without pickle and without layout; reading one needs only torch and safetensors."""

from pgm_scale.checkpoint.fragments import KINDS, FileEntry, Fragment, Kind, TensorKey
from pgm_scale.checkpoint.lock import RunLock
from pgm_scale.checkpoint.peers import ALONE, Peers
from pgm_scale.checkpoint.reader import Range, Wanted
from pgm_scale.checkpoint.store import CheckpointStore

__all__ = [
    "ALONE",
    "KINDS",
    "CheckpointStore",
    "FileEntry",
    "Fragment",
    "Kind",
    "Peers",
    "Range",
    "RunLock",
    "TensorKey",
    "Wanted",
]
