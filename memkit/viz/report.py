"""A comparison as one page: a table that sorts, figures, settings, and how to run it again. Nothing is loaded."""

from __future__ import annotations

import base64
import io
import math
import re
import shlex
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

from memkit.catalog import is_shipped
from memkit.comparison import Comparison, Measurement
from memkit.trained import DELETED, OWN
from memkit.viz import figures, style
from memkit.viz.comparison import notes
from memkit.yaml12 import dump

__all__ = ["page"]

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1"
DEFAULT_TEXTS = ("pydoc_data.topics of Python", "IDLE's help, Python", "IDLE's news to 2.7, Python")
"""What is read where nothing is asked for, as settings name it."""
NUMBERED = re.compile(r" \([0-9]+\)\Z")
"""What tells policies of one name apart."""


class _Column(NamedTuple):
    """A column: its head, what it means, how a cell reads, and the number that it is sorted by."""

    head: str
    meaning: str
    text: Callable[[Measurement], str]
    number: Callable[[Measurement], float | None]


def _percent(share: float | None, error: float | None) -> str:
    if share is None:
        return "–"
    return f"{share:.0%}" if error is None else f"{share:.0%} ± {100 * error:.0f}"


_COLUMNS = (
    _Column(
        "memory, MB", "held once the text is read", lambda e: f"{e.bytes / 1e6:,.1f}", lambda e: float(e.bytes)
    ),
    _Column(
        "peak, MB", "the most until the last decoded token", lambda e: f"{e.peak_bytes / 1e6:,.1f}",
        lambda e: float(e.peak_bytes),
    ),
    _Column(
        "rows a head", "slots and window", lambda e: f"{e.slots + e.window:,}", lambda e: float(e.slots + e.window)
    ),
    _Column("loss, nats", "per token", lambda e: f"{e.loss:.3f}", lambda e: e.loss),
    _Column(
        "gap closed", "of the loss from streaming-4-512 (0%) to full (100%)",
        lambda e: _percent(e.gap_closed, e.gap_error), lambda e: e.gap_closed,
    ),
    _Column(
        "second text", "gap closed there", lambda e: _percent(e.second_gap_closed, e.second_gap_error),
        lambda e: e.second_gap_closed,
    ),
    _Column(
        "read, tok/s", "tokens read in a second", lambda e: f"{e.tokens_per_second:,.0f}",
        lambda e: e.tokens_per_second,
    ),
    _Column("decode, ms", "per token, median", lambda e: f"{e.decode_ms:.0f}", lambda e: e.decode_ms),
)  # fmt: skip

_STYLE = """
:root{color-scheme:light dark;--ink:#1f1f1f;--paper:#fff;--line:#d5d5d5;--soft:#666;--front:#0072b2}
@media (prefers-color-scheme:dark){:root{--ink:#ececec;--paper:#14161a;--line:#3a3f48;--soft:#a3a8b0;--front:#5cb3ea}}
body{margin:2rem auto;max-width:74rem;padding:0 1rem;color:var(--ink);background:var(--paper);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.soft{color:var(--soft)}p.soft{margin:.1rem 0}
.figures{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0;max-width:36rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);text-align:right;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid var(--front)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
tr.front td:first-child{font-weight:600;color:var(--front)}
img{max-width:100%;height:auto}.dark{display:none}
@media (prefers-color-scheme:dark){.dark{display:inline}.light{display:none}}
pre{overflow-x:auto;padding:.7rem;border:1px solid var(--line);border-radius:4px}
"""

_SCRIPT = """
"use strict";
const table = document.querySelector("table.sortable"), body = table.tBodies[0];
table.querySelectorAll("th").forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return (column ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
  };
  [...body.rows].sort(compare).forEach(row => body.append(row));
}));
"""

_SAFE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page asks for nothing from anywhere, and a browser sees to it."""


def page(comparison: Comparison, title: str = "Memory policies compared") -> str:
    """The whole page, as HTML. Raises `ModelError` where matplotlib is not installed."""
    settings = comparison.settings
    said = "".join(f"<p class='soft'>{escape(note)}</p>" for note in notes(comparison))
    drawn = [_picture(comparison, figures.front, "Loss against memory; the line joins the policies on the front")]
    if any(entry.gap_closed is not None for entry in comparison.policies):
        drawn.append(
            _picture(comparison, figures.gap_closed, "The gap closed, with one standard error where it is known")
        )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{_SAFE}">
<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(str(settings["model"]))} reads {settings["tokens"]:,} tokens under {len(comparison.policies)} policies.
Click a head to sort; policies on the front are in bold.</p>
<div class="wide">{_table(comparison)}</div>
<h2>Figures</h2><div class="figures">{"".join(drawn)}</div>
<h2>Settings</h2>{said}
<h2>Run it again</h2><pre>{escape(_command(comparison))}</pre>
<script>{_SCRIPT}</script></body></html>
"""


def _table(comparison: Comparison) -> str:
    """As `viz.comparison.table`: what is known of no policy has no column."""
    columns = [column for column in _COLUMNS if any(column.number(entry) is not None for entry in comparison.policies)]
    heads = "<th scope='col'><button type='button'>policy</button></th>" + "".join(
        f"<th scope='col' title='{escape(column.meaning)}'><button type='button'>{escape(column.head)}</button></th>"
        for column in columns
    )
    rows: list[str] = []
    for entry in sorted(comparison.policies, key=lambda entry: (not entry.front, entry.bytes, entry.loss)):
        name = escape(entry.policy, quote=True)
        cells = [f"<td data-value='{name}'>{name}</td>"]
        for column in columns:
            number = column.number(entry)
            value = "" if number is None or not math.isfinite(number) else number
            cells.append(f"<td data-value='{value}'>{escape(column.text(entry))}</td>")
        rows.append(f"<tr{' class=front' if entry.front else ''}>{''.join(cells)}</tr>")
    return f"<table class='sortable'><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _picture(comparison: Comparison, draw: Callable[[Comparison], Any], words: str) -> str:
    """A figure as SVG, once for white pages and once for black ones."""
    shown: list[str] = []
    for dark in (False, True):
        written = io.BytesIO()
        with style.theme(dark):
            style.write(draw(comparison).figure, written, "svg")
        data = base64.b64encode(written.getvalue()).decode("ascii")
        theme = "dark" if dark else "light"
        shown.append(f"<img class='{theme}' alt='{escape(words)}' src='data:image/svg+xml;base64,{data}'>")
    return f"<figure>{''.join(shown)}<figcaption class='soft'>{escape(words)}</figcaption></figure>"


def _command(comparison: Comparison) -> str:
    """The commands that measure it again, and that make this page of it.

    A comparison knows files by their names alone: those that are not in the working folder must be given their paths.
    """
    settings = comparison.settings
    words = ["memkit", "compare", *_asked(comparison)]
    if settings["model"] != DEFAULT_MODEL:
        words += ["--model", str(settings["model"])]
    for option in ("text", "second_text"):
        source = settings.get(option)
        if source and not str(source).startswith(DEFAULT_TEXTS):
            words += [f"--{option.removesuffix('_text')}", str(source)]
    words += ["--tokens", str(settings["tokens"]), "--skip", str(settings["skip"])]
    if settings.get("prefill", "policy") != "policy":
        words += ["--prefill", settings["prefill"]]
    for budget in ("rows", "share", "bytes"):
        if settings.get(budget):
            words += [f"--{budget}", str(settings[budget])]
    for field, value in settings.get("overrides", {}).items():
        words += ["--set", f"{field}={dump(value, on_one_line=True).removesuffix('...' + chr(10)).strip()}"]
    versions = ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())
    return "\n".join(
        [
            f"# {versions}; model {settings['model']}, text {settings.get('text', 'given')}",
            shlex.join([*words, "--json", "comparison.json"]),
            "memkit report report.html --comparison comparison.json",
        ]
    )


def _asked(comparison: Comparison) -> list[str]:
    """The policies as the command line takes them: a shipped name, or a file; none of what is measured unasked."""
    labels = [entry.policy for entry in comparison.policies if entry.policy != OWN]
    if DELETED in labels:  # what a trained model is compared with where no policy is named
        return []
    names = [NUMBERED.sub("", label) for label in labels]
    return [name if is_shipped(name) else f"{name}.yaml" for name in names]
