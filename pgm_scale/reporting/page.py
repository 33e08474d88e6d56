"""The report as one HTML page: pictures inside, no script, nothing fetched, readable on a phone and in the dark."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pgm_scale.reporting.drawing import HEIGHT_PIXELS, WIDTH_PIXELS
from pgm_scale.reporting.panels import Panel


@dataclass(frozen=True)
class Picture:
    """A panel over one of its x axes. `name` is that of the PNG file."""

    panel: Panel
    axis_key: str
    name: str
    png: bytes


@dataclass(frozen=True)
class Table:
    """Attributes: rows: of as many cells as `head`; marked: numbers of the rows to highlight."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; `folded` tables are opened by their title."""

    title: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    folded: tuple[str, Table] | None = None
    note: str = ""


_STYLE = """
:root { color-scheme: light dark; --line: #8886; --mark: #e0a83933; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; opacity: .8; overflow-wrap: anywhere; }
.pictures { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
img { display: block; height: auto; width: 100%; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem 1.1rem .25rem 0; text-align: left; }
th, td { white-space: nowrap; }
tr.marked { background: var(--mark); }
summary { cursor: pointer; padding: .4rem 0; }
.over { accent-color: #3b82d6; margin: 0 .3rem 0 0; }
.over + label { margin-right: 1.2rem; }
#by-step:checked ~ main .tokens, #by-tokens:checked ~ main .step { display: none; }
@media print { .over, .over + label { display: none; } }
"""


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole document. Pictures over steps and over tokens share a place; two radio buttons choose."""
    keys = {picture.axis_key for section in sections for picture in section.pictures}
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p>{_text(subtitle)}</p>
</header>
{_CHOICE if {"step", "tokens"} <= keys else ""}
<main>
{body}
</main>
</body>
</html>
"""


_CHOICE = """<input class="over" type="radio" name="over" id="by-step" checked>
<label for="by-step">over steps</label>
<input class="over" type="radio" name="over" id="by-tokens">
<label for="by-tokens">over tokens</label>"""


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{_text(section.title)}</h2>"]
    if section.note:
        parts.append(f"<p>{_text(section.note)}</p>")
    if section.pictures:
        parts.append('<div class="pictures">')
        parts += [_picture(picture) for picture in section.pictures]
        parts.append("</div>")
    parts += [_table(table) for table in section.tables]
    if section.folded is not None:
        title, table = section.folded
        parts.append(f"<details>\n<summary>{_text(title)}</summary>\n{_table(table)}\n</details>")
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    panel = picture.panel
    axis = next(axis for axis in panel.x_axes if axis.key == picture.axis_key)
    names = ", ".join(line.label for line in panel.lines if not line.faint)
    alt = f"{panel.title}: {panel.y_axis.label} over {axis.label}, of {names}"
    data = base64.b64encode(picture.png).decode()
    return (
        f'<img class="{_text(picture.axis_key)}" width="{WIDTH_PIXELS}" height="{HEIGHT_PIXELS}" '
        f'alt="{_text(alt)}" src="data:image/png;base64,{data}">'
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.head)
    rows = [
        f'<tr{" class=" + chr(34) + "marked" + chr(34) if index in table.marked else ""}><th scope="row">'
        + f"{_text(first)}</th>"
        + "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        + "</tr>"
        for index, (first, *rest) in enumerate(table.rows)
    ]
    return (
        f'<div class="table">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table>\n</div>"
    )


def _text(text: str) -> str:
    """Escaped, and of signs that HTML and UTF-8 can hold: a folder's name may hold any bytes."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return html.escape(shown)


def shown(value: Any) -> str:
    """A setting as it stands in the YAML, in one line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
