"""One picture of one run: the losses, and the cross-entropy by mask fraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pgm_scale.reporting.training_panels import last_cross_entropies


def plot_curves(
    records: list[dict[str, Any]],
    path: str | Path,
    title: str,
    unigram_nll: float | None = None,
    resumed_at_step: int | None = None,
) -> None:
    """A PNG of the training loss, the validation bound and the cross-entropy by mask fraction.

    Args:
        unigram_nll: drawn as a line for comparison, nats a token.
        resumed_at_step: marked, to show that nothing happens to the curve there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [record["step"] for record in records]
    left.plot(steps, [record["loss_mean"] for record in records], lw=0.8, label="training loss")
    validated = [record for record in records if "validation_nll" in record]
    left.plot(
        [record["step"] for record in validated],
        [record["validation_nll"] for record in validated],
        "o-",
        label="validation bound (EMA weights)",
    )
    if unigram_nll is not None:
        left.axhline(unigram_nll, color="gray", ls="--", lw=1, label="unigram model")
    if resumed_at_step is not None:
        left.axvline(resumed_at_step, color="black", ls=":", lw=1, label="stopped and resumed")
    left.set(xlabel="step", ylabel="nats per token", title=title)
    left.legend(frameon=False)

    means = last_cross_entropies(records)
    heights = [0.0 if mean is None else mean for mean in means]
    right.bar([(bucket + 0.5) / len(means) for bucket in range(len(means))], heights, width=0.9 / len(means))
    right.set(
        xlabel="share of the sequence that is predicted",
        ylabel="cross-entropy, nats per token",
        title="by mask fraction, last tenth of training",
    )
    figure.savefig(str(path), dpi=110)
