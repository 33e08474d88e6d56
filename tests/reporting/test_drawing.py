"""Pictures of panels: also of odd names, of single points and of numbers far apart."""

import io
import warnings

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pgm_scale.reporting.drawing import HEIGHT_PIXELS, WIDTH_PIXELS, draw, draw_on, short_number
from pgm_scale.reporting.panels import Axis, Line, Mark, Panel


def _panel(*lines, log=False, **more):
    return Panel(
        "key", "Title", (Axis("x", "x, units", log),), Axis("y", "y, units", log), list(lines), **more
    )


def _image(panel):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Image.open(io.BytesIO(draw(panel, panel.x_axes[0])))


def _colors(image):
    return {pixel for _, pixel in image.convert("RGBA").getcolors(1 << 20) if pixel[3] == 255}


def test_a_picture_has_its_size_a_clear_ground_and_a_colour_a_line():
    lines = [Line(f"run {i}", {"x": [0.0, 1.0]}, [float(i), i + 1.0], color=i) for i in range(3)]
    image = _image(_panel(*lines))
    assert image.size == (WIDTH_PIXELS, HEIGHT_PIXELS)
    assert image.convert("RGBA").getpixel((2, 2))[3] == 0
    assert {(0x3B, 0x82, 0xD6, 255), (0xE0, 0x7B, 0x39, 255), (0x2F, 0x9E, 0x6B, 255)} <= _colors(image)
    assert (0x8F, 0x6A, 0xD1, 255) not in _colors(image)


@pytest.mark.parametrize(
    "name", ["$\\frac{$", "_hidden", "a\nb\0", "\u540d\u524d \U0001f600", "x" * 300, "", "\udc80", "<b>&"]
)
def test_any_name_can_be_drawn(name):
    line = Line(name, {"x": [1.0, 2.0]}, [1.0, 2.0], point_labels=["$1", "2"])
    assert _image(_panel(line, marks=[Mark({"x": 1.5}, "round $1")])).size == (WIDTH_PIXELS, HEIGHT_PIXELS)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1.0], [2.0]),
        ([1.0, 2.0, 3.0], [None, 2.0, None]),
        ([None, None], [1.0, 2.0]),
        ([1.0, 2.0], [0.0, 5.0]),
        ([1.0, 2.0], [-1.0, 1.0]),
        ([1e-30, 1e30], [1e-200, 1e200]),
        ([1.0, 1.0], [3.0, 3.0]),
        ([], []),
    ],
)
def test_any_numbers_can_be_drawn(x, y, log):
    line = Line("run", {"x": x}, y, error=[None if value is None else abs(value) / 2 for value in y])
    assert _image(_panel(line, log=log)).size == (WIDTH_PIXELS, HEIGHT_PIXELS)


def test_more_runs_than_colours_are_told_apart_by_their_dash():
    def drawn(color):
        return draw(panel := _panel(Line("run", {"x": [0.0, 1.0]}, [0.0, 1.0], color=color)), panel.x_axes[0])

    assert len({drawn(color) for color in (0, 8, 16, 24)}) == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (999.0, "999"),
        (1500.0, "1.5k"),
        (-20_000.0, "-20k"),
        (3.2e7, "32M"),
        (5.24e11, "524B"),
        (2e12, "2T"),
        (3e-4, "3e-4"),
        (2.5e-5, "2.5e-5"),
        (1e15, "1e15"),
        (1.1 + 2.2, "3.3"),
    ],
)
def test_numbers_on_an_axis_are_short(value, text):
    assert short_number(value) == text


def test_numbers_that_are_close_are_told_apart():
    assert short_number(3.86512, digits=7) == "3.86512"
    figure = Figure()
    for low, high in ((3.8646, 3.8653), (100_000.0, 100_004.0), (0.5, 80.0)):
        axes = figure.add_subplot()
        draw_on(axes, panel := _panel(Line("run", {"x": [0.0, 1.0]}, [low, high])), panel.x_axes[0])
        texts = [label.get_text() for label in axes.get_yticklabels()]
        assert len(set(texts)) == len(texts) > 2
