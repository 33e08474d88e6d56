"""The numbers of an evaluation as a table: aligned text, or a drawn table on a terminal."""

from __future__ import annotations

import math
import sys
from typing import Any

_COLUMNS = ("metric", "value", "+-", "of")
# Of a form of the generative perplexity, its name in the table.
_FORMS = ("retokenised_first_chunk", "raw_tokens", "per_sample_mean")


def print_result(result: dict[str, Any]) -> None:
    """Print `evaluate`'s result on stdout: a line for each split, then all numbers as a table."""
    for score in result.get("likelihood", []):
        print(summary(score))
    print_table(result)


def summary(score: dict[str, Any]) -> str:
    """The likelihood of a split in one line."""
    if "perplexity" in score:
        value = f"perplexity {score['perplexity']:.3f} +- {score['perplexity_standard_error']:.3f} "
        value += f"({score['nll_nats_per_token']:.4f} nats/token, "
    else:
        value = f"loss {score['loss']:.5f} +- {score['loss_standard_error']:.5f} ("
    return (
        f"{score['split']}: {value}{score['sequences']} sequences, "
        f"{score['draws']} draw(s), step {score['step']}, {score['weights']} weights)"
    )


def print_table(result: dict[str, Any]) -> None:
    """Print the table of `evaluate`'s result on stdout."""
    rows = table_rows(result)
    if not sys.stdout.isatty():
        print(aligned([_COLUMNS, *rows]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in ("value", "+-") else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns of equal width, numbers to the right, two spaces between."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in (1, 2) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a number: metric, value, standard error, and what it is of."""
    rows: list[tuple[str, ...]] = [_likelihood_row(score) for score in result.get("likelihood", [])]
    rows += _generative_rows(result.get("generative_perplexity"))
    for name, spread in (("mauve", "mauve_standard_deviation"), ("self_bleu", "self_bleu_standard_error")):
        if name in result:
            part = result[name]
            what = f"{part['prompts']} prompts, {part['completions']} completions, {_sampling(part)}"
            rows.append((name, _number(part[name]), _number(part[spread]), what))
    return rows + _harness_rows(result.get("harness"))


def _likelihood_row(score: dict[str, Any]) -> tuple[str, ...]:
    name = "perplexity" if "perplexity" in score else "loss"
    what = f"{score['split']}: {score['sequences']} sequences, {score['draws']} draw(s)"
    return (name, _number(score[name]), _number(score[f"{name}_standard_error"]), what)


def _generative_rows(part: dict[str, Any] | None) -> list[tuple[str, ...]]:
    if part is None:
        return []
    what = f"{part['samples']} samples, {_sampling(part)}"
    rows: list[tuple[str, ...]] = [
        (
            f"generative perplexity, {form}",
            _number(part[form]["perplexity"]),
            _number(part[form].get("perplexity_standard_error")),
            part[form].get("reason", what),
        )
        for form in _FORMS
    ]
    return [*rows, ("unigram entropy", _number(part["unigram_entropy_nats"]), "", what)]


def _harness_rows(part: dict[str, Any] | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if part is None:
        return rows
    for task, metrics in part["tasks"].items():
        what = f"{part['examples'].get(task, 0)} examples, {part['likelihood']}"
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr")
                rows.append((f"{task} {name}", _number(value), _number(error), what))
    return rows


def _sampling(part: dict[str, Any]) -> str:
    if part["sampler"] is None:
        return f"from {part['file']}"
    return f"{part['sampler']}, {part['steps']} steps"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
