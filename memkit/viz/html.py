"""What a terminal shows, as HTML: the same tables and words, for notebooks and report pages.

Colours are the page's own, so that it reads on white and on black; nothing is loaded and no script runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memkit.errors import InputError

__all__ = ["STYLE", "fragment", "markup"]

STYLE = """<style>
.memkit{font-size:.92em;line-height:1.45;max-width:100%;overflow-x:auto}
.memkit table{border-collapse:collapse;margin:.4em 0;font-variant-numeric:tabular-nums}
.memkit th,.memkit td{padding:.15em .7em .15em 0;text-align:left;vertical-align:baseline;background:none;border:0}
.memkit th{font-weight:600;border-bottom:1px solid rgba(128,128,128,.55);vertical-align:bottom}
.memkit .r{text-align:right}
.memkit .cut td{border-top:1px solid rgba(128,128,128,.35)}
.memkit p{margin:.2em 0}
.memkit pre{margin:.4em 0;line-height:1.2;background:none;color:inherit}
.memkit .dim{opacity:.72;font-size:.92em}
.memkit .bold{font-weight:600}
.memkit .green{color:#1a8754}.memkit .red{color:#d6453d}.memkit .cyan{color:#2487b8}.memkit .yellow{color:#b07d00}
</style>"""
"""How fragments look; colours that read on white and on black."""

KNOWN = ("bold", "dim", "green", "red", "cyan", "yellow")
"""Styles of rich that have a class here."""


def fragment(renderable: RenderableType) -> str:
    """A piece of a page with its style, as `_repr_html_` returns it."""
    return f'{STYLE}<div class="memkit">{markup(renderable)}</div>'


def markup(renderable: RenderableType) -> str:
    """HTML without the style: of texts, tables, and groups of these.

    Raises `InputError` for anything else: what a terminal shows would be missing.
    """
    if isinstance(renderable, str):
        return f"<p>{escape(renderable)}</p>"
    if isinstance(renderable, Text):
        return _text(renderable)
    if isinstance(renderable, Table):
        return _table(renderable)
    if isinstance(renderable, Group):
        return "".join(markup(part) for part in renderable.renderables)
    raise InputError(f"only texts, tables and groups have an HTML form, got {type(renderable).__name__}")


def _text(text: Text) -> str:
    """A paragraph; where it has several lines, or columns, as it stands."""
    if not text.plain.strip():
        return ""
    tag = "pre" if "\n" in text.plain.strip("\n") or re.search(r"\S {2,}\S", text.plain) else "p"
    return f"<{tag}{_class(str(text.style))}>{_spans(text)}</{tag}>"


def _spans(text: Text) -> str:
    """The letters of a text, each run of one style in a span of its own."""
    borders = sorted({0, len(text), *(edge for span in text.spans for edge in (span.start, span.end))})
    parts: list[str] = []
    for start, end in pairwise(borders):
        styles = " ".join(str(span.style) for span in text.spans if span.start <= start and end <= span.end)
        letters, known = escape(text.plain[start:end]), _class(styles)
        parts.append(f"<span{known}>{letters}</span>" if known else letters)
    return "".join(parts)


def _table(table: Table) -> str:
    sides = [' class="r"' if column.justify == "right" else "" for column in table.columns]
    heads = "".join(f"<th{side}>{_cell(column.header)}</th>" for side, column in zip(sides, table.columns, strict=True))
    rows: list[str] = []
    cut = False
    cells = [list(column.cells) for column in table.columns]
    for number, row in enumerate(table.rows):
        classes = " ".join(part for part in ("cut" if cut else "", _known(str(row.style or ""))) if part)
        body = "".join(f"<td{side}>{_cell(column[number])}</td>" for side, column in zip(sides, cells, strict=True))
        rows.append(f'<tr class="{classes}">{body}</tr>' if classes else f"<tr>{body}</tr>")
        cut = row.end_section
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(cell: RenderableType) -> str:
    """A header or a cell: a text, whose lines are kept."""
    if isinstance(cell, Text):
        known = _class(str(cell.style))
        inside = _spans(cell)
        inside = f"<span{known}>{inside}</span>" if known else inside
    else:
        inside = escape(str(cell))
    return inside.replace("\n", "<br>")


def _class(style: str) -> str:
    known = _known(style)
    return f' class="{known}"' if known else ""


def _known(style: str) -> str:
    return " ".join(dict.fromkeys(_words(style)))


def _words(style: str) -> Iterator[str]:
    yield from (word for word in style.split() if word in KNOWN)
