"""A run folder: what lies where in it, what the run is, and how its trained model is loaded for use.

    <run>/config.yaml         the resolved configuration
    <run>/run.json            identity: run id, vocabulary, length, fingerprints of tokenizer and training data
    <run>/tokenizer.json      the data set's tokenizer
    <run>/vq.safetensors      of image codes: the weights of the VQ tokenizer that tokenizer.json describes
    <run>/metrics.jsonl       one JSON object a logged step
    <run>/heartbeat.json      what it is doing and how it ended, see `pgm_scale.watching`
    <run>/metrics.prom        the same for Prometheus
    <run>/unit_costs.json     seconds of each kind of unit, by which a pipeline is split into stages
    <run>/samples/            text generated at validations
    <run>/hangs/              the stacks of all ranks, if one of them hung
    <run>/checkpoints/        see `pgm_scale.checkpoint.step_folders`
    <run>/first_checkpoint    see there too
    <run>/run.lock            who writes here now

config.yaml and run.json hold the SHA-256 of the rest of themselves: a byte of them decides what the weights mean.

Loading a model here imports neither deepspeed nor megatron.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgm_scale import config as configuration
from pgm_scale.checkpoint.manifest import MANIFEST_NAME as CHECKPOINT_MANIFEST_NAME
from pgm_scale.checkpoint.step_folders import StepFolders
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig, SDTTObjectiveConfig
from pgm_scale.data.manifest import (
    VQ_WEIGHTS_NAME,
    DatasetManifest,
    ImageContent,
    Vocabulary,
    image_differences,
)
from pgm_scale.data.storage import is_remote
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, commit, sha256_file, temporary_name
from pgm_scale.model_folder import copy_weights
from pgm_scale.models import build_model
from pgm_scale.sealed import open_sealed_json, sealed_json
from pgm_scale.secrets import secret_problems
from pgm_scale.trained_model import ModelDescription, Origin, TrainedModel, Weights

logger = logging.getLogger(__name__)

# First, so that no cut leaves the rest without it.
_SEALED = re.compile(rb"# sha256 of the lines below: ([0-9a-f]{64})\n(.*)", re.DOTALL)
_READ_ATTEMPTS = 3

# A resumed run must agree with itself in these; the rest may change between sessions.
_FIXED_SECTIONS = ("model", "objective", "optimizer")
_FIXED_KEYS = (
    ("training", "global_batch_sequences"),
    ("training", "precision"),
    ("training", "seed"),
    ("training", "ema_decay"),
    ("data", "shuffle_block_shards"),
)


@dataclass(frozen=True)
class RunIdentity:
    """What a run is besides its configuration; equal for its whole life."""

    run_id: str
    vocabulary: Vocabulary
    length_tokens: int
    tokenizer_sha256: str
    train_shards_sha256: str
    images: ImageContent | None = None  # what the rows are; None for text
    distilled_from: Origin | None = None  # the first teacher of a distillation

    @classmethod
    def new(cls, train: DatasetManifest, distilled_from: Origin | None = None) -> RunIdentity:
        shards = json.dumps([(shard.name, shard.rows, shard.sha256) for shard in train.shards])
        return cls(
            uuid.uuid4().hex[:12],
            train.vocabulary,
            train.length_tokens,
            train.tokenizer_sha256,
            hashlib.sha256(shards.encode()).hexdigest(),
            train.images,
            distilled_from,
        )


class RunFolder:
    """The places in a run folder, and its two descriptions."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.identity_path = self.path / "run.json"
        self.tokenizer_path = self.path / "tokenizer.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.unit_costs_path = self.path / "unit_costs.json"
        self.samples_path = self.path / "samples"
        self.hangs_path = self.path / "hangs"
        self.roll_backs_path = self.path / "roll_backs.json"

    def create_or_match(
        self,
        config: RunConfig,
        train: DatasetManifest,
        tokenizer_path: Path,
        distilled_from: Origin | None = None,
    ) -> RunIdentity:
        """Describe a new run, or see that `config` and the data go on with the run that is there.

        Raises:
            UserError: a setting that a run must keep, or the data, differs: the differences are listed; or a
                secret would be written.
        """
        secrets = secret_problems(configuration.to_mapping(config))
        if secrets:
            raise UserError(f"cannot write the configuration of {self.path}:\n  " + "\n  ".join(secrets))
        stored = self.check_continues(config, train) if self.identity_path.exists() else None
        if stored is None:
            self._refuse_lost_identity()
            self.path.mkdir(parents=True, exist_ok=True)
        self._copy_tokenizer(train, tokenizer_path)
        text = configuration.to_yaml(_with_absolute_paths(config)).encode()
        seal = f"# sha256 of the lines below: {hashlib.sha256(text).hexdigest()}\n"
        atomic_write_bytes(self.config_path, seal.encode() + text)
        if stored is not None:
            return stored
        # Last: its presence says that the description is whole.
        identity = RunIdentity.new(train, distilled_from)
        atomic_write_bytes(self.identity_path, sealed_json(dataclasses.asdict(identity)))
        return identity

    def _refuse_lost_identity(self) -> None:
        folders = StepFolders(self.path)
        if folders.have_been():
            owners = {owner for step in folders.steps() if (owner := folders.owner(step)) is not None}
            raise UserError(
                f"{self.identity_path} is missing, but the run has had checkpoints (run_id "
                f"{', '.join(sorted(owners)) or 'unknown'}); restore it, or train in a new folder"
            )

    def _copy_tokenizer(self, train: DatasetManifest, source: Path) -> None:
        """The data's, which was verified; again if the run's own is lost or damaged."""
        if not _has_sha256(self.tokenizer_path, train.tokenizer_sha256):
            if self.identity_path.exists():
                logger.warning("%s was missing or damaged; copied again from the data", self.tokenizer_path)
            _copy(source, self.tokenizer_path)
        weights = self.path / VQ_WEIGHTS_NAME
        is_of_codes = train.images is not None and train.images.tokens == "codes"
        if is_of_codes and not (weights.exists() and self.identity_path.exists()):
            _copy(source.with_name(VQ_WEIGHTS_NAME), weights)

    def check_continues(self, config: RunConfig, train: DatasetManifest) -> RunIdentity:
        """The identity of the run that is there, if `config` and the data go on with it; else a `UserError`."""
        stored = self.identity()
        problems = _config_differences(self.config(), config)
        problems += _identity_differences(stored, RunIdentity.new(train))
        if problems:
            raise UserError(
                f"{self.path} holds a run that this configuration does not continue:\n  "
                + "\n  ".join(problems)
                + "\n  put these back, or train in a new folder"
            )
        return stored

    def config(self) -> RunConfig:
        if not self.config_path.exists():
            raise UserError(
                f"{self.path} is not a run folder (no config.yaml in it); give the folder of a run"
            )
        try:
            sealed = _SEALED.fullmatch(self.config_path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {self.config_path}: {error.strerror}; restore it") from None
        if sealed is not None and hashlib.sha256(sealed[2]).hexdigest().encode() != sealed[1]:
            raise UserError(
                f"{self.config_path} is damaged, or was edited: it is not what its first line says; restore it, or "
                "remove that line if all of it is meant so"
            )
        return configuration.load(self.config_path)

    def description(self, origin: Origin) -> ModelDescription:
        """Of the model that this run trains."""
        config, identity = self.config(), self.identity()
        return ModelDescription(
            config.model,
            configuration.likelihood_objective(config.objective, config.model),
            config.sampler,
            identity.vocabulary,
            identity.length_tokens,
            identity.tokenizer_sha256,
            identity.images,
            origin,
        )

    def unit_costs(self, kinds: Iterable[str], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Seconds of each kind of unit: those that were measured before in this run, or else now."""
        try:
            costs = json.loads(self.unit_costs_path.read_bytes())
            seconds = [float(costs[kind]) for kind in kinds]
            if not all(0 <= cost < math.inf for cost in seconds):  # so written, NaN fails
                raise ValueError(f"costs of {seconds}")
        except FileNotFoundError:
            costs = measure()
            atomic_write_bytes(self.unit_costs_path, (json.dumps(costs, indent=2) + "\n").encode())
        except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"cannot use {self.unit_costs_path} ({type(error).__name__}: {error}); "
                "delete it to measure the costs again"
            ) from None
        return costs

    def identity(self) -> RunIdentity:
        try:
            data = self.identity_path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.identity_path} ({error}); give the folder of a run") from None
        problems: list[str] = []
        try:
            identity = configuration.parse(RunIdentity, open_sealed_json(data, needs_seal=False), problems)
        except ValueError as error:
            problems = [str(error)]
        if problems:
            raise UserError(
                f"{self.identity_path} is damaged: {' '.join('; '.join(problems).split())}; restore it"
            )
        return identity


def _has_sha256(path: Path, sha256: str) -> bool:
    try:
        return sha256_file(path) == sha256
    except OSError:
        return False


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    temporary = temporary_name(target)
    shutil.copyfile(source, temporary)
    commit(temporary, target)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """So that the run can be evaluated, and a distillation begun, from any working folder."""
    data, objective = config.data, config.objective
    train, validation = (
        path if is_remote(path) else str(Path(path).absolute()) for path in (data.train, data.validation)
    )
    if isinstance(objective, SDTTObjectiveConfig):
        objective = dataclasses.replace(objective, teacher=str(Path(objective.teacher).absolute()))
    data = dataclasses.replace(data, train=train, validation=validation)
    return dataclasses.replace(config, data=data, objective=objective)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, child in tree.items() for k, v in _flatten(child, f"{prefix}.{key}").items()}
    return {prefix.removeprefix("."): tree}


def _config_differences(stored: RunConfig, given: RunConfig) -> list[str]:
    def fixed(config: RunConfig) -> dict[str, Any]:
        tree = configuration.to_mapping(config)
        values = _flatten({section: tree[section] for section in _FIXED_SECTIONS})
        values.pop("objective.teacher", None)  # a distillation starts from it and never looks again
        return values | {f"{section}.{key}": tree[section][key] for section, key in _FIXED_KEYS}

    was, now = fixed(stored), fixed(given)
    return [
        f"{key}: the run has {was.get(key)!r}, now it is {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def _identity_differences(stored: RunIdentity, given: RunIdentity) -> list[str]:
    names = {
        "vocabulary": "vocabulary",
        "length_tokens": "sequence length",
        "tokenizer_sha256": "tokenizer",
        "train_shards_sha256": "training shards",
    }
    lines = [
        f"data.train: the {label} differs: the run has {getattr(stored, key)}, now it is {getattr(given, key)}"
        for key, label in names.items()
        if getattr(stored, key) != getattr(given, key)
    ]
    return lines + [f"data.train: {line}" for line in image_differences(stored.images, given.images)]


def check_fits_run(manifest: DatasetManifest, identity: RunIdentity | ModelDescription, where: str) -> None:
    """Refuse to read a split with a model that was trained on other token ids."""
    lines = [
        f"{label}: the run has {mine}, the split has {theirs}"
        for label, mine, theirs in (
            ("tokenizer", identity.tokenizer_sha256, manifest.tokenizer_sha256),
            ("vocabulary", identity.vocabulary, manifest.vocabulary),
            ("sequence length", identity.length_tokens, manifest.length_tokens),
        )
        if mine != theirs
    ]
    lines += image_differences(identity.images, manifest.images)
    if lines:
        raise UserError(f"{where} does not fit the run:\n  " + "\n  ".join(lines))


def load_run(
    folder: str | Path,
    *,
    step: int | None = None,
    weights: Weights = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TrainedModel:
    """Load a checkpoint of a run; `ema` falls back to the weights of a run without an average.

    Args:
        step: None for the newest good one.

    Raises:
        UserError: no run, no such checkpoint, a bad one, or one that does not fit its own configuration.
    """
    run = RunFolder(folder)
    config, identity = run.config(), run.identity()
    if run.tokenizer_path.exists() and not _has_sha256(run.tokenizer_path, identity.tokenizer_sha256):
        raise UserError(
            f"{run.tokenizer_path} is damaged: it is not the run's tokenizer; copy it again from its data"
        )
    store = CheckpointStore(run.path)
    for attempt in range(_READ_ATTEMPTS):
        before = store.steps()
        try:
            chosen, origin = choose_checkpoint(run, store, step, weights)
            values = store.read_full(chosen, origin.weights)
            break
        except UserError:  # training may have removed it just now, and have saved a newer one
            if step is not None or store.steps() == before or attempt == _READ_ATTEMPTS - 1:
                raise
    model = build_model(config.model, identity.vocabulary.size, identity.length_tokens)
    copy_weights(model, values, f"checkpoint {chosen} of {run.path}")
    model.eval().requires_grad_(False)
    return TrainedModel(model.to(device, dtype), run.description(origin), run.path)


def choose_checkpoint(
    run: RunFolder, store: CheckpointStore, step: int | None, weights: Weights
) -> tuple[int, Origin]:
    """The verified step to read of somebody's run, and what is there of it; collective over the store's peers.

    Args:
        step: None for the newest good one.
        weights: `ema` falls back to the weights of a run without an average.

    Raises:
        UserError: no such checkpoint, or a bad one.
    """
    if step is None:
        step = store.newest_verified(repair=False)
        if step is None:
            raise UserError(f"{run.path} has no checkpoint yet; train it first (pgm-scale train)")
    elif step in store.steps():
        store.verify(step)
    else:
        raise UserError(f"{run.path} has no checkpoint of step {step}; give one of {store.steps()}")
    kind: Weights = weights if weights in store.kinds(step) else "weight"
    return step, Origin(run.config().name, run.identity().run_id, step, kind, checkpoint_sha256(store, step))


def checkpoint_sha256(store: CheckpointStore, step: int) -> str:
    """Of the step's manifest, which holds the SHA-256 of each of its files.

    Raises:
        UserError: it is gone: training keeps the newest steps only.
    """
    path = store.folders.of(step) / CHECKPOINT_MANIFEST_NAME
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; use one of the steps {store.steps()}") from None
