"""Pictures and text from a run's `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pgm_scale.errors import UserError


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; give the metrics.jsonl of a run") from None


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
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

    last = [record["cross_entropy_by_mask_fraction"] for record in records[-max(1, len(records) // 10) :]]
    means = [_mean([row[bucket] for row in last]) for bucket in range(len(last[0]))]
    right.bar([(bucket + 0.5) / len(means) for bucket in range(len(means))], means, width=0.9 / len(means))
    right.set(
        xlabel="share of the sequence that is predicted",
        ylabel="cross-entropy, nats per token",
        title="by mask fraction, last tenth of training",
    )
    figure.savefig(str(path), dpi=110)
    plt.close(figure)


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
