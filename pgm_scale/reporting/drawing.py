"""Panels to PNG, on a transparent ground and in tones that can be read on a light page and on a dark one."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

from pgm_scale.reporting.panels import Axis, Line, Mark, Panel

WIDTH_PIXELS, HEIGHT_PIXELS = 1040, 720
_DPI = 200
_INK = "#7c828b"  # 4:1 to white and 5:1 to black
_COLORS = ("#3b82d6", "#e07b39", "#2f9e6b", "#d14d5f", "#8f6ad1", "#1d9ca8", "#c9679f", "#9a8a2c")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = "osD^"
_LONGEST_LABEL = 44


def draw(panel: Panel, axis: Axis) -> bytes:
    """The PNG of a panel over one of its x axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    inches = (WIDTH_PIXELS / _DPI, HEIGHT_PIXELS / _DPI)
    figure = Figure(inches, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    draw_on(figure.add_subplot(), panel, axis)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run may be named in any script
        figure.savefig(file, format="png", transparent=True)
    return file.getvalue()


def draw_on(axes: Any, panel: Panel, axis: Axis) -> None:
    """Draw a panel on matplotlib axes."""
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    axes.set_xlabel(axis.label, fontsize=9, color=_INK)
    axes.set_ylabel(panel.y_axis.label, fontsize=9, color=_INK)
    axes.tick_params(which="both", labelsize=8.5, colors=_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    handles = [handle for line in panel.lines if (handle := _draw_line(axes, line, axis.key))]
    if any(line.faint for line in panel.lines):
        (raw,) = axes.plot([], [], color=_INK, lw=0.6, alpha=0.6)
        handles.append((raw, "thin: raw values"))
    if panel.marks:
        axes.margins(y=0.16)  # room for their names
    for mark in panel.marks:
        _draw_mark(axes, mark, axis.key)
    _scale(axes.xaxis, axes.set_xscale, axis.log, _values(line.x[axis.key] for line in panel.lines))
    _scale(axes.yaxis, axes.set_yscale, panel.y_axis.log, _values(line.y for line in panel.lines))
    axes.grid(color=_INK, alpha=0.22, lw=0.6)
    _legend(axes, handles)


def _draw_line(axes: Any, line: Line, key: str) -> tuple[Any, str] | None:
    """One line; its handle and name for the legend, if it has an entry."""
    indices = [i for i, (x, y) in enumerate(zip(line.x[key], line.y, strict=True)) if None not in (x, y)]
    xs, ys = [line.x[key][i] for i in indices], [line.y[i] for i in indices]
    color, few = _COLORS[line.color % len(_COLORS)], len(xs) <= 40
    # More runs than colours: the dash tells them apart.
    dash = (line.dash + line.color // len(_COLORS)) % len(_DASHES)
    if line.faint:
        axes.plot(xs, ys, color=color, lw=0.6, alpha=0.35)
        return None
    (handle,) = axes.plot(
        xs,
        ys,
        color=color,
        lw=1.5,
        ls=_DASHES[dash],
        marker=_MARKERS[dash] if few else None,
        ms=4 if len(xs) <= 12 else 2.5,
    )
    if line.error is not None:
        errors = [line.error[i] or 0.0 for i in indices]
        axes.errorbar(xs, ys, errors, fmt="none", ecolor=color, elinewidth=1.0, capsize=2.5, alpha=0.8)
    if line.point_labels is not None:
        for i, x, y in zip(indices, xs, ys, strict=True):
            axes.annotate(
                line.point_labels[i],
                (x, y),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=color,
                parse_math=False,
            )
    return handle, line.label


def _draw_mark(axes: Any, mark: Mark, key: str) -> None:
    if (x := mark.x.get(key)) is None:
        return
    color = _COLORS[mark.color % len(_COLORS)]
    axes.axvline(x, color=color, ls=":", lw=1)
    axes.annotate(
        mark.label,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(2, -2),
        textcoords="offset points",
        rotation=90,
        va="top",
        fontsize=7,
        color=color,
    )


def _values(columns: Any) -> list[float]:
    return [value for column in columns for value in column if value is not None]


def _scale(axis: Any, set_scale: Any, log: bool, values: Sequence[float]) -> None:
    """Linear or logarithmic, with short round labels."""
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullLocator

    if log and values and min(values) > 0:
        set_scale("log")
        # Within a decade a logarithmic axis would have one label or none.
        wide = max(values) > 30 * min(values)
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        if max(values) < 2 * min(values):
            axis.set_major_locator(AutoLocator())
        axis.set_minor_locator(NullLocator())
    close = bool(values) and max(values) - min(values) < 0.01 * max(map(abs, values))
    digits = 7 if close else 4
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, digits)))


def short_number(value: float, digits: int = 4) -> str:
    """At most so many significant digits, as 1.5k, 30M, 0.25 or 3e-4; B is 10^9, T 10^12."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def _legend(axes: Any, handles: list[tuple[Any, str]]) -> None:
    """Below the picture, where it hides no line; a name is text, whatever signs are in it."""
    if not handles:
        return
    names = [_shortened(name) for _, name in handles]
    columns = max(1, min(len(names), 64 // (max(map(len, names)) + 6)))
    legend = axes.figure.legend(
        [handle for handle, _ in handles],
        [f"line {index}" for index in range(len(names))],
        loc="outside lower left",
        ncols=columns,
        fontsize=8,
        frameon=False,
        labelcolor=_INK,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _shortened(name: str) -> str:
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    half = _LONGEST_LABEL // 2
    return name if len(name) <= _LONGEST_LABEL else f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
