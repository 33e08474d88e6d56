"""Run folders as labelled columns of numbers, and the settings that tell them apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pgm_scale.config import read_yaml
from pgm_scale.errors import UserError
from pgm_scale.reporting.metrics_file import number, read_metrics
from pgm_scale.run_folder import RunFolder


@dataclass(frozen=True)
class TrainingRun:
    """What a run folder says of a training.

    Attributes:
        label: the end of the folder's path that no other run of the report shares.
        settings: of `config.yaml` and `run.json`, `section.key` to value.
        length_tokens: of a sequence.
        records: of `metrics.jsonl`, at least one, by step.
    """

    label: str
    folder: str
    run_id: str
    settings: dict[str, Any]
    length_tokens: int
    records: list[dict[str, Any]]

    @property
    def rounds(self) -> list[tuple[int, dict[str, Any]]]:
        """(round, record) at which each but the first round of a distillation begins."""
        known = self.with_values("round")
        pairs = itertools.pairwise(known)
        return [(int(after["round"]), after) for before, after in pairs if before["round"] != after["round"]]

    def with_values(self, key: str) -> list[dict[str, Any]]:
        """The records in which `key` is a number."""
        return [row for row in self.records if number(row.get(key)) is not None]

    def places(self, records: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
        """Where records lie on the axes `step` and `tokens`."""
        return {
            "step": [float(record["step"]) for record in records],
            "tokens": [self.tokens(record) for record in records],
        }

    def tokens(self, record: dict[str, Any]) -> float | None:
        samples = number(record.get("samples"))
        return None if samples is None else samples * self.length_tokens


def open_runs(folders: Sequence[str]) -> list[TrainingRun]:
    """The runs in `folders`, one given twice only once.

    Raises:
        UserError: a folder holds no run, no metrics yet, or damaged ones.
    """
    unique = list({Path(folder).resolve(): folder for folder in reversed(folders)}.items())[::-1]
    labels = short_names([path.as_posix() for path, _ in unique])
    return [_open(folder, label) for (_, folder), label in zip(unique, labels, strict=True)]


def _open(folder: str, label: str) -> TrainingRun:
    run = RunFolder(folder)
    if not run.config_path.exists():
        raise UserError(f"{folder} is not a run folder (no config.yaml in it); give the folder of a run")
    identity = run.identity()
    records = read_metrics(run.metrics_path) if run.metrics_path.exists() else []
    if not records:
        raise UserError(f"{folder} has no metrics yet; wait for its first record, or leave it out")
    # Not parsed further: the settings of an older version can be shown, too.
    settings = flatten(read_yaml(run.config_path)) | {
        "data.length_tokens": identity.length_tokens,
        "data.vocabulary_size": identity.vocabulary.size,
        "data.tokenizer_sha256": identity.tokenizer_sha256[:12],
        "data.train_shards_sha256": identity.train_shards_sha256[:12],
    }
    settings.pop("folder", None)  # differs always, and heads the columns
    return TrainingRun(label, folder, identity.run_id, settings, identity.length_tokens, records)


def short_names(paths: Sequence[str]) -> list[str]:
    """Of each path as many last parts as tell it from all others; equal paths stay equal."""
    parts = [PurePath(path).parts for path in paths]
    names = []
    for mine in parts:
        depth = next(
            (
                depth
                for depth in range(1, len(mine))
                if all(other == mine or other[-depth:] != mine[-depth:] for other in parts)
            ),
            len(mine),
        )
        names.append(str(PurePath(*mine[-depth:])) if mine else "")
    return names


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with `section.key` as keys."""
    if isinstance(tree, dict):
        return {k: v for key, child in tree.items() for k, v in flatten(child, f"{prefix}.{key}").items()}
    return {prefix.removeprefix("."): tree}


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys, in order of first appearance, that not all have with the same value."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [
        key for key in keys if any(key not in one or one[key] != settings[0].get(key) for one in settings)
    ]
