"""The HTML page: whole, closed, self-contained, and proof against names."""

import base64

import pytest

from pgm_scale.reporting.page import Picture, Section, Table, page
from pgm_scale.reporting.panels import Axis, Line, Panel
from tests.reporting.parsed_page import parse

HOSTILE = "</title><script>alert('1')</script>\"'& <img src=http://x onerror=1>\0\n\udcff"


def _picture(name, axis):
    panel = Panel(
        name, name, (Axis("step", "step"), Axis("tokens", "tokens")), Axis("y", name), [Line(name, {}, [])]
    )
    return Picture(panel, axis, f"{name}.png", b"\x89PNG bytes of " + axis.encode())


def test_names_stay_text():
    table = Table([HOSTILE, "b"], [[HOSTILE, HOSTILE]], frozenset({0}))
    section = Section(HOSTILE, [_picture(HOSTILE, "step")], [table], (HOSTILE, table), HOSTILE)
    parsed = parse(page(HOSTILE, HOSTILE, [section]))
    assert parsed.tags.isdisjoint({"script", "a", "link", "iframe", "object"})
    assert parsed.counts["img"] == 1
    shown = HOSTILE.replace("\0", "\N{REPLACEMENT CHARACTER}").replace("\n", "\N{REPLACEMENT CHARACTER}")
    shown = shown.replace("\udcff", "\N{REPLACEMENT CHARACTER}")
    assert parsed.text.count(shown) == 12
    assert shown in parsed.attributes["alt"][0]


def test_pictures_are_inside():
    text = page("title", "", [Section("one", [_picture("loss", "step"), _picture("loss", "tokens")])])
    sources = parse(text).attributes["src"]
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources] == [
        b"\x89PNG bytes of step",
        b"\x89PNG bytes of tokens",
    ]


def test_steps_or_tokens_can_be_chosen_where_there_are_both():
    both = page("t", "", [Section("one", [_picture("loss", "step"), _picture("loss", "tokens")])])
    assert parse(both).counts["input"] == 2
    assert "#by-step:checked ~ main .tokens" in both
    assert parse(page("t", "", [Section("one", [_picture("loss", "step")])])).counts["input"] == 0


def test_highlighted_rows_are_those_marked():
    text = page("t", "", [Section("s", tables=[Table(["a"], [["one"], ["two"], ["three"]], frozenset({1}))])])
    assert text.count('class="marked"') == 1
    assert text.index("one") < text.index('class="marked"') < text.index("two")


def test_the_parser_of_these_tests_sees_what_is_not_closed():
    for text in ("<p><b></p></b>", "<div>", "</p>"):
        with pytest.raises(AssertionError):
            parse(text)
