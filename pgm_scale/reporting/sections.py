"""The tables of a report: last values of runs, points of evaluations, and the settings in which runs differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

from pgm_scale.reporting.evaluations import Evaluation
from pgm_scale.reporting.metrics_file import number
from pgm_scale.reporting.page import Picture, Section, Table, shown
from pgm_scale.reporting.panels import smoothed
from pgm_scale.reporting.quality_panels import quality_labels
from pgm_scale.reporting.training_panels import loss_unit
from pgm_scale.reporting.training_runs import TrainingRun, differing

_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def training_section(runs: Sequence[TrainingRun], pictures: Sequence[Picture]) -> Section:
    """Curves of the runs, and where they stand."""
    columns = [last_values(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    kinds = {run.settings.get("objective.kind") for run in runs}
    note = "Losses of different objectives are not comparable." if len(kinds) > 1 else ""
    table = Table(["last values", *(run.label for run in runs)], rows)
    return Section("Training", pictures, [table], note=note)


def last_values(run: TrainingRun) -> dict[str, str]:
    """What a run has come to, for people."""
    last = run.records[-1]
    tokens = run.tokens(last)
    total = number(run.settings.get("training.steps"))
    values = {"step": f"{last['step']:,}" + (f" of {int(total):,}" if total else "")}
    if tokens is not None:
        values["training tokens"] = f"{tokens:,.0f}"
    if losses := run.with_values("loss_mean"):
        mean = smoothed([float(record["loss_mean"]) for record in losses])[-1]
        unit = loss_unit([run])
        values["training loss" if unit == "loss" else f"training loss, {unit}"] = f"{mean:.4g}"
    for name, error in (
        ("validation_nll", None),
        ("validation_loss", "validation_loss_standard_error"),
        ("validation_perplexity", "validation_perplexity_standard_error"),
    ):
        if validated := run.with_values(name):
            values[name.replace("_", " ").replace("nll", "NLL, nats per token")] = _with_error(
                validated[-1], name, error
            )
            if error is not None:
                best = min(validated, key=itemgetter(name))
                values[f"lowest {name.replace('_', ' ')}"] = (
                    f"{_with_error(best, name, error)} at step {best['step']:,}"
                )
    for name, label in _LAST.items():
        if known := run.with_values(name):
            values[label] = f"{known[-1][name]:.4g}"
    if speeds := run.with_values("tokens_per_second"):
        values["tokens/s, median"] = f"{statistics.median(row['tokens_per_second'] for row in speeds):,.0f}"
    if utilised := run.with_values("mfu"):
        values["MFU, median"] = f"{statistics.median(row['mfu'] for row in utilised):.1%}"
    if (time_s := number(last.get("unix_time_s"))) is not None:
        values["last record, UTC"] = _utc(time_s)
    return values


_LAST = {
    "round": "round",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "codebook_usage": "share of codes in use",
    "codebook_perplexity": "perplexity of the codes",
}


def _utc(time_s: float) -> str:
    try:
        return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):  # no year of any calendar
        return "unknown"


def _with_error(record: dict[str, Any], name: str, error: str | None) -> str:
    margin = number(record.get(error)) if error else None
    return f"{record[name]:.4g}" + (f" {_PLUS_MINUS} {margin:.2g}" if margin is not None else "")


def settings_section(runs: Sequence[TrainingRun]) -> Section:
    """Side by side; those in which the runs differ first and highlighted, the common ones folded away."""
    different = differing([run.settings for run in runs])
    head = ["setting", *(run.label for run in runs)]
    folder = ["folder", *(run.folder for run in runs)]
    rows = [
        [key, *(shown(run.settings[key]) if key in run.settings else "\N{EM DASH}" for run in runs)]
        for key in different
    ]
    common = [[key, shown(value)] for key, value in runs[0].settings.items() if key not in different]
    return Section(
        "Settings",
        tables=[Table(head, [folder, *rows], frozenset(range(1, len(rows) + 1)))],
        folded=(
            f"{len(common)} settings" + (" that all share" if len(runs) > 1 else ""),
            Table(["setting", "value"], common),
        ),
        note="" if rows or len(runs) == 1 else "The runs have the same settings.",
    )


def quality_section(points: Sequence[Evaluation], pictures: Sequence[Picture]) -> Section:
    """Quality against speed, and every point as a row; text and images have a table each."""
    by_speed: dict[str, list[Evaluation]] = {}
    for point in points:
        by_speed.setdefault(point.speed_name, []).append(point)
    tables = [_points_table(name, group) for name, group in by_speed.items()]
    return Section("Quality against speed", pictures, tables)


def _points_table(speed_name: str, points: Sequence[Evaluation]) -> Table:
    names = list(dict.fromkeys(name for point in points for name in point.qualities))
    varying = differing([point.settings for point in points])
    entropies = any(point.entropy is not None for point in points)
    unit = speed_name.replace("_per_second", "/s").replace("_per_process", " a process")
    head = ["model", "steps", *(quality_labels(name)[0] for name in names)]
    head += ["entropy, nats"] * entropies + [unit, *varying, "file"]
    rows = []
    for point in points:
        row = [point.label, f"{point.steps:,}"]
        row += [f"{point.qualities[name]:.4g}" if name in point.qualities else "" for name in names]
        if entropies:
            row.append("" if point.entropy is None else f"{point.entropy:.3f}")
        row.append(f"{point.speed:,.0f}" if point.speed >= 1000 else f"{point.speed:.4g}")
        row += [shown(point.settings[key]) if key in point.settings else "" for key in varying]
        rows.append([*row, point.file])
    return Table(head, rows)
