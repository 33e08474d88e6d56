"""The pictures of training runs: losses, gradient norm, learning rate, speed, and what some objectives add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pgm_scale.reporting.metrics_file import number
from pgm_scale.reporting.panels import Axis, Line, Mark, Panel, smoothed
from pgm_scale.reporting.training_runs import TrainingRun

STEP, TOKENS = Axis("step", "step"), Axis("tokens", "training tokens")
# Objectives whose loss is a cross-entropy, or a bound on one.
_NATS_KINDS = {"pgm", "mdlm", "complementary_mdlm", "d3pm", "autoregressive", "image_pgm", "maskgit"}


def training_panels(runs: Sequence[TrainingRun]) -> list[Panel]:
    """Those for which at least one run has numbers."""
    panels = [
        *_training_losses(runs),
        _validation_loss(runs),
        _panel(
            runs,
            "validation_perplexity",
            "Validation perplexity",
            Axis("perplexity", "perplexity \N{PLUS-MINUS SIGN} standard error", log=True),
            "validation_perplexity",
            error="validation_perplexity_standard_error",
        ),
        _panel(
            runs,
            "gradient_norm",
            "Gradient norm, before clipping",
            Axis("gradient_norm", "L2 norm", log=True),
            "gradient_norm",
            smooth=True,
        ),
        _panel(
            runs, "learning_rate", "Learning rate", Axis("learning_rate", "learning rate"), "learning_rate"
        ),
        _panel(
            runs,
            "throughput",
            "Training throughput",
            Axis("tokens_per_second", "tokens/s"),
            "tokens_per_second",
            smooth=True,
        ),
        _panel(
            runs,
            "mfu",
            "Model FLOPs utilisation",
            Axis("mfu", "share of the peak"),
            "mfu",
            smooth=True,
        ),
        mask_fraction_panel(runs),
        _panel(
            runs, "codebook_usage", "Codes in use", Axis("usage", "share of the codebook"), "codebook_usage"
        ),
        _panel(
            runs,
            "codebook_perplexity",
            "Perplexity of the codes",
            Axis("codes", "codes, if equally frequent"),
            "codebook_perplexity",
        ),
    ]
    return [panel for panel in panels if panel.lines]


def _training_losses(runs: Sequence[TrainingRun]) -> list[Panel]:
    """One a unit: a divergence of 0.1 beside a cross-entropy of 5 would be a flat line."""
    units = dict.fromkeys(loss_unit([run]) for run in runs)
    panels = []
    for unit in units:
        # Runs of other units keep their places, which are their colours, but have no values here.
        key, title = "training_loss", "Training loss"
        if len(units) > 1 and unit != "loss":
            key, title = f"training_loss_{unit.replace(' ', '_')}", f"Training loss, {unit}"
        own = [run if loss_unit([run]) == unit else None for run in runs]
        panels.append(_panel(own, key, title, Axis("loss", unit), "loss_mean", smooth=True))
    return panels


def loss_unit(runs: Sequence[TrainingRun]) -> str:
    """What the runs' training losses are counted in, if it is the same for all."""
    if {run.settings.get("objective.kind") for run in runs} <= _NATS_KINDS:
        return "nats per token"
    divergences = {run.settings.get("objective.divergence") for run in runs}  # of a distillation
    return (
        str(divergences.pop()).replace("_", " ")
        if len(divergences - {None}) == 1 == len(divergences)
        else "loss"
    )


def _panel(
    runs: Sequence[TrainingRun | None],
    key: str,
    title: str,
    y_axis: Axis,
    field: str,
    smooth: bool = False,
    error: str | None = None,
) -> Panel:
    """`field` over steps and tokens; with `smooth`, raw values stay behind the line. None leaves a colour out."""
    lines, marks = [], []
    for color, run in enumerate(runs):
        if run is None or not (records := run.with_values(field)):
            continue
        places, values = run.places(records), [float(record[field]) for record in records]
        errors = None if error is None else [number(record.get(error)) for record in records]
        marks += _round_marks(run, color)
        if smooth and len(values) >= 50:
            breaks = [records.index(record) for _, record in run.rounds if record in records]
            lines.append(Line(run.label, places, list(values), color=color, faint=True))
            values = smoothed(values, breaks)
        lines.append(Line(run.label, places, list(values), errors, color=color))
    lines.sort(key=lambda line: not line.faint)
    return Panel(key, title, (STEP, TOKENS), y_axis, lines, marks)


def _round_marks(run: TrainingRun, color: int) -> list[Mark]:
    return [
        Mark({"step": float(record["step"]), "tokens": run.tokens(record)}, f"round {number_}", color)
        for number_, record in run.rounds
    ]


def _validation_loss(runs: Sequence[TrainingRun]) -> Panel:
    """Of likelihoods the NLL (its error is the perplexity's over the perplexity), of others the loss."""
    lines, marks = [], []
    likelihoods = all(run.with_values("validation_nll") for run in runs)
    unit = "nats per token" if likelihoods else loss_unit(runs)
    for color, run in enumerate(runs):
        records = run.with_values("validation_nll") or run.with_values("validation_loss")
        if not records:
            continue
        values, errors = zip(*(_validation(record) for record in records), strict=True)
        places = run.places(records)
        lines.append(Line(run.label, places, list(values), list(errors), color=color))
        marks += _round_marks(run, color)
    label = f"{unit} \N{PLUS-MINUS SIGN} standard error"
    return Panel("validation_loss", "Validation loss", (STEP, TOKENS), Axis("loss", label), lines, marks)


def _validation(record: dict[str, Any]) -> tuple[float | None, float | None]:
    """Value and standard error."""
    if (nll := number(record.get("validation_nll"))) is None:
        return number(record["validation_loss"]), number(record.get("validation_loss_standard_error"))
    perplexity = number(record.get("validation_perplexity"))
    error = number(record.get("validation_perplexity_standard_error"))
    return nll, error / perplexity if perplexity and error is not None else None


def mask_fraction_panel(runs: Sequence[TrainingRun]) -> Panel:
    lines = []
    for color, run in enumerate(runs):
        # An autoregressive model predicts with one share of the sequence only, which is no curve.
        means = last_cross_entropies(run.records)
        if sum(mean is not None for mean in means) > 1:
            x: list[float | None] = [(bucket + 0.5) / len(means) for bucket in range(len(means))]
            lines.append(Line(run.label, {"mask_fraction": x}, means, color=color))
    return Panel(
        "cross_entropy_by_mask_fraction",
        "Cross-entropy by mask fraction, last tenth",
        (Axis("mask_fraction", "share of the sequence that is predicted"),),
        Axis("cross_entropy", "nats per token"),
        lines,
    )


def last_cross_entropies(records: Sequence[dict[str, Any]]) -> list[float | None]:
    """Means by the share of the sequence that is predicted, over the last tenth of the records that have them."""
    rows = [row for record in records if (row := _buckets(record))]
    rows = [row for row in rows[-max(1, len(rows) // 10) :] if len(row) == len(rows[-1])]
    return [_mean(bucket) for bucket in zip(*rows, strict=True)]


def _buckets(record: dict[str, Any]) -> list[float | None]:
    values = record.get("cross_entropy_by_mask_fraction")
    return [number(value) for value in values] if isinstance(values, list) else []


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
