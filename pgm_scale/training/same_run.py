"""All ranks were given the same run: configuration, data, code and folder, before the first step.

Nothing else would tell. A rank with another learning rate, seed or split trains on, and the weights that are saved
are of no run that anybody described; a rank whose run folder is another disk (a local one of its node) writes its
part of every checkpoint where nobody looks for it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import pgm_scale
from pgm_scale import config as configuration
from pgm_scale.checkpoint.lock import RunLock
from pgm_scale.checkpoint.peers import Peers
from pgm_scale.config import RunConfig
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.errors import UserError
from pgm_scale.parallel.rendezvous import ranks_text

# Places, which nodes may have each in its own way: what lies there is compared.
_PLACES = ("folder", "data.train", "data.validation", "data.cache_folder", "watching.prometheus_folder")
_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")
_SHOWN_DIFFERENCES = 8
_LOCK_PATIENCE_S, _POLL_S = 60.0, 0.5  # a network file system may show a new file late

Facts = dict[str, str]


def check_same_on_all_ranks(
    config: RunConfig,
    train: DatasetManifest,
    validation: DatasetManifest,
    peers: Peers,
    lock: RunLock | None,
) -> None:
    """Collective, when rank 0 holds the run's `lock`.

    Raises:
        UserError: on all ranks, naming what differs from rank 0, and on which ranks.
    """
    if peers.world_size == 1:
        return
    facts = _facts(config, train, validation)
    digests = peers.all_gather(hashlib.sha256(json.dumps(facts).encode()).hexdigest())
    if len(set(digests)) > 1:
        _refuse(peers.all_gather(facts))
    if lock is not None:
        ours = peers.first(lock.path.read_bytes)
        patience_s = min(_LOCK_PATIENCE_S, config.parallel.timeout_s)
        peers.each(partial(_check_folder, lock.path, ours, peers, patience_s))


def _facts(config: RunConfig, train: DatasetManifest, validation: DatasetManifest) -> Facts:
    given = {
        key: value for key, value in _leaves(configuration.to_mapping(config)).items() if key not in _PLACES
    }
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        **given,
        "the training data": _data_digest(train),
        "the validation data": _data_digest(validation),
        "the code of pgm-scale": _code_digest(),
        "Python": platform.python_version(),
        **versions,
    }


def _refuse(facts: list[Facts]) -> None:
    differing: dict[tuple[str, str], list[int]] = {}
    for rank, found in enumerate(facts):
        for key in sorted(found.keys() | facts[0].keys()):
            if found.get(key) != facts[0].get(key):
                differing.setdefault((key, found.get(key, "not set")), []).append(rank)
    lines = [
        f"{key}: {value} on {ranks_text(ranks)}, {facts[0].get(key, 'not set')} on rank 0"
        for (key, value), ranks in differing.items()
    ]
    hidden = len(lines) - _SHOWN_DIFFERENCES
    raise UserError(
        "the ranks were not given the same run; start all with the same command, data and code:\n  "
        + "\n  ".join(lines[:_SHOWN_DIFFERENCES])
        + (f"\n  and {hidden} more differences" if hidden > 0 else "")
    )


def _check_folder(path: Path, lock: bytes, peers: Peers, patience_s: float) -> None:
    """Whether this rank sees the run folder in which rank 0 has put its lock."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            if path.read_bytes() == lock:
                return
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline_s:
            raise UserError(
                f"{path.parent.absolute()} is not the run folder of rank 0, or not shared with it: put `folder` on "
                "a file system that all nodes share"
            )
        peers.progress("looking for the lock of rank 0 in the run folder")
        time.sleep(_POLL_S)


def _leaves(tree: Any, key: str = "") -> Facts:
    if not isinstance(tree, dict):
        return {key: json.dumps(tree)}
    return {
        name: value
        for part, child in tree.items()
        for name, value in _leaves(child, f"{key}.{part}" if key else str(part)).items()
    }


def _data_digest(manifest: DatasetManifest) -> str:
    """Of the rows, which every shard's hash stands for, and their order."""
    shards = [(shard.name, shard.rows, shard.sha256) for shard in manifest.shards]
    content = json.dumps([manifest.tokenizer_sha256, manifest.length_tokens, shards])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _code_digest() -> str:
    """Of the sources, 2 MB that were read a moment ago."""
    root, digest = Path(pgm_scale.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
