"""The pictures of evaluations: quality against speed, a line a model and sampler (paper, figures 1 and 4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from pgm_scale.reporting.evaluations import Evaluation, line_labels, settings_key
from pgm_scale.reporting.panels import Axis, Line, Panel

_SPEED_LABELS = {
    "tokens_per_second": "sampling speed, tokens/s",
    "images_per_second": "sampling speed, images/s",
    "images_per_second_per_process": "sampling speed, images/s a process",
}
_QUALITY_LABELS = {
    "fid": ("FID", "FID"),
    "light_distance": ("Distance of light features", "distance (not FID)"),
}


def quality_panels(points: Sequence[Evaluation], run_labels: Sequence[str]) -> list[Panel]:
    """One a kind of quality, and one of the entropy, over each kind of speed that was measured.

    Args:
        run_labels: of training runs, whose colours their evaluations share.
    """
    groups = _lines_of_points(points)
    colors = _colors(groups, run_labels)
    panels = []
    for speed_name in dict.fromkeys(point.speed_name for point in points):
        axis = Axis(speed_name, _SPEED_LABELS[speed_name], log=True)
        for name in dict.fromkeys(name for point in points for name in point.qualities):
            title, label = quality_labels(name)
            y_axis = Axis(name, f"{label}, lower is better", log=True)
            lines = _lines(groups, colors, speed_name, partial(_quality, name))
            panels.append(Panel(_key(name, speed_name), title, (axis,), y_axis, lines))
        lines = _lines(groups, colors, speed_name, _entropy)
        y_axis = Axis("unigram_entropy", "unigram entropy, nats")
        panels.append(Panel(_key("entropy", speed_name), "Entropy of the samples", (axis,), y_axis, lines))
    return [panel for panel in panels if panel.lines]


def _quality(name: str, point: Evaluation) -> float | None:
    return point.qualities.get(name)


def _entropy(point: Evaluation) -> float | None:
    return point.entropy


def quality_labels(name: str) -> tuple[str, str]:
    """Title and short name of a quality."""
    if name in _QUALITY_LABELS:
        return _QUALITY_LABELS[name]
    words = [word for part in name.split(".") for word in part.split("_")]
    variant = " ".join(dict.fromkeys(word for word in words if word not in ("generative", "perplexity")))
    title = f"Generative perplexity, {variant}" if variant else "Generative perplexity"
    return title, "generative perplexity"


def _lines_of_points(points: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    """By the name of the line."""
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for point in points:
        groups.setdefault((point.label, settings_key(point)), []).append(point)
    names = line_labels([(group[0].label, group[0].settings) for group in groups.values()])
    return dict(zip(names, groups.values(), strict=True))


def _colors(groups: dict[str, list[Evaluation]], run_labels: Sequence[str]) -> dict[str, int]:
    """A run's own colour for its first line, a new one for every other."""
    free = {label: color for color, label in enumerate(run_labels)}
    new = itertools.count(len(run_labels))
    colors = {}
    for name, (first, *_) in groups.items():
        own = free.pop(first.label, None)
        colors[name] = next(new) if own is None else own
    return colors


def _lines(
    groups: dict[str, list[Evaluation]],
    colors: dict[str, int],
    speed_name: str,
    value: Callable[[Evaluation], float | None],
) -> list[Line]:
    lines = []
    for name, group in groups.items():
        kept = [point for point in group if point.speed_name == speed_name and value(point) is not None]
        if kept:
            lines.append(
                Line(
                    name,
                    {speed_name: [point.speed for point in kept]},
                    [value(point) for point in kept],
                    point_labels=[str(point.steps) for point in kept],
                    color=colors[name],
                )
            )
    return lines


def _key(quality: str, speed_name: str) -> str:
    """A file name."""
    unit = speed_name.removesuffix("_per_second").removesuffix("_per_second_per_process")
    return "".join(letter if letter.isalnum() else "_" for letter in f"{quality}_against_{unit}_s")
