"""Results of `pgm-scale eval --json` and `eval-images --out` as points of quality and speed.

A file holds one result, or a list of them. Numbers are found by their names, at whatever depth they stand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgm_scale.errors import UserError
from pgm_scale.files import read_bounded
from pgm_scale.reporting.metrics_file import number
from pgm_scale.reporting.training_runs import TrainingRun, differing, flatten, short_names

_SPEEDS = ("tokens_per_second", "images_per_second", "images_per_second_per_process")
_DISTANCES = ("fid", "light_distance")
_GENERATIVE = "generative_perplexity"
_LINE_SETTINGS = (
    "run_id",
    "step",
    "weights",
    "precision",
    "seed",
    "count",
    "samples",
    "batch_sequences",
    "labels",
    "device",
)


@dataclass(frozen=True)
class Evaluation:
    """One point: a model, how it was sampled, and what was measured.

    Attributes:
        label: of the model, as that of its training run if the report has it.
        settings: what makes another line: checkpoint, sampler and so on, without the steps.
        steps: of sampling.
        speed: in units of `speed_name`.
        qualities: by name; lower is better.
        entropy: nats, of text.
    """

    label: str
    file: str
    settings: dict[str, Any]
    steps: int
    speed_name: str
    speed: float
    qualities: dict[str, float]
    entropy: float | None


def open_evaluations(paths: Sequence[str], runs: Sequence[TrainingRun]) -> list[Evaluation]:
    """The points of all files, by model, settings and steps; those of `runs` have their labels.

    Raises:
        UserError: a file is no JSON, or says too little for a point: it and what is missing are named.
    """
    rows = [(path, row) for path in dict.fromkeys(paths) for row in _read(path)]
    known = {run.run_id: run.label for run in runs}
    names = list(dict.fromkeys(_model(path, row) for path, row in rows))
    labels = {
        name: name if short in known.values() else short
        for name, short in zip(names, short_names(names), strict=True)
    }
    points = [
        _evaluation(path, row, known.get(str(_find(row, "run_id")), labels[_model(path, row)]))
        for path, row in rows
    ]
    order = list(dict.fromkeys([*known.values(), *(point.label for point in points)]))
    return sorted(points, key=lambda point: (order.index(point.label), settings_key(point), point.steps))


def settings_key(point: Evaluation) -> str:
    """Equal for points of one line of a model."""
    return json.dumps(point.settings, sort_keys=True)


def _read(path: str) -> list[dict[str, Any]]:
    try:
        return _rows(json.loads(read_bounded(path)))
    except OSError as error:
        raise UserError(f"--eval {path}: cannot be read ({error.strerror}); give a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--eval {path}: not JSON ({error}); give what `eval --json` wrote") from None


def _rows(tree: Any) -> list[dict[str, Any]]:
    """The flat results in a file; of one of `eval`, its part on generative perplexity."""
    rows = []
    for result in tree if isinstance(tree, list) else [tree]:
        flat = flatten(result) if isinstance(result, dict) else {}
        part = {key: value for key, value in flat.items() if key.startswith(f"{_GENERATIVE}.")}
        plain = {key: value for key, value in flat.items() if "." not in key}
        rows.append(plain | part if part else flat)
    return rows


def _evaluation(path: str, row: dict[str, Any], label: str) -> Evaluation:
    """Raises: UserError: it names what is missing."""
    qualities = _qualities(row)
    if not qualities:
        wanted = " or ".join((_GENERATIVE, *_DISTANCES))
        raise UserError(f"--eval {path}: no quality ({wanted}) in it; leave that file out")
    speed_name, speed = _positive(path, row, "speed", _SPEEDS)
    _, steps = _positive(path, row, "number of sampling steps", ("steps",))
    entropy = number(_find(row, "unigram_entropy_nats"))
    return Evaluation(label, path, _settings(row), int(steps), speed_name, speed, qualities, entropy)


def _model(path: str, row: dict[str, Any]) -> str:
    return str(_find(row, "run") or _find(row, "model") or Path(path).stem)


def _find(row: dict[str, Any], name: str) -> Any:
    """The value of this name that is not null and stands least deep."""
    keys = [key for key, value in row.items() if _leaf(key) == name and value is not None]
    return row[min(keys, key=lambda key: key.count("."))] if keys else None


def _positive(path: str, row: dict[str, Any], meaning: str, names: Sequence[str]) -> tuple[str, float]:
    for name in names:
        if (value := number(_find(row, name))) is not None and value > 0:
            return name, value
    raise UserError(f"--eval {path}: no {meaning} ({' or '.join(names)}) in it; leave that file out")


def _qualities(row: dict[str, Any]) -> dict[str, float]:
    """Positive numbers that are a generative perplexity, by its form, or a distance."""
    found = {}
    for key, value in row.items():
        form, _, name = key.rpartition(".")
        quality = number(value)
        if quality is None or quality <= 0:
            continue
        if name in _DISTANCES:
            found[name] = quality
        elif name == "perplexity" and form.startswith(_GENERATIVE):
            found[form] = quality
    return found


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    """What tells lines apart: checkpoint, sampler, judge and device; not the sampling steps."""
    found = {name: _find(row, name) for name in _LINE_SETTINGS}
    for key, value in row.items():
        section, _, name = key.rpartition(".")
        if name == "sampler":
            found["sampler"] = value
        elif _leaf(section) in ("sampler", "sampler_settings") and name != "steps":
            found["sampler" if name == "kind" else name] = value
        elif _leaf(section) == "judge" and name == "path":
            found["judge"] = value
    return {name: value for name, value in found.items() if value is not None}


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def line_labels(groups: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """A name for each (label, settings): the label, and those settings in which equal labels differ."""
    names = []
    for label, settings in groups:
        keys = differing([other for other_label, other in groups if other_label == label])
        said = [
            str(settings[key]) if key == "sampler" else f"{key.replace('_', ' ')} {settings[key]}"
            for key in keys
            if key in settings
        ]
        names.append(", ".join([label, *said]))
    return names
