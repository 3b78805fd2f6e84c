"""What became of each law, as a table, and a line while they are tried."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.text import Text

from memkit.viz.html import fragment
from memkit.viz.tables import columns

if TYPE_CHECKING:
    from memkit.testing.law import Law
    from memkit.testing.report import Report

__all__ = ["html", "report", "watching"]

STYLES = {"held": "green", "broken": "bold red", "not claimed": "dim"}


def report(examined: Report) -> RenderableType:
    """A line per law, and the counter-examples of the broken ones below."""
    table = columns("law", "verdict", "what it says", align="llw")
    family = ""
    for verdict in examined.verdicts:
        if verdict.law.family != family:
            family = verdict.law.family
            table.add_row(Text(family, style="bold"))
        style = STYLES[verdict.status]
        table.add_row(f"  {verdict.law.name}", Text(verdict.status, style=style), Text(verdict.law.says))
    parts: list[RenderableType] = [Text(examined.subject, style="bold")]
    if examined.note:
        parts.append(Text(examined.note))
    return Group(*parts, table, *(Text(f"{error}\n") for error in examined.broken))


def html(examined: Report) -> str:
    """The report for a notebook."""
    return fragment(report(examined))


@contextmanager
def watching() -> Generator[Callable[[Law], None]]:
    """A line on standard error that says which law is being tried, gone when all are."""
    console = Console(stderr=True)
    with console.status("checking") as status:
        yield lambda law: status.update(f"checking {law.family}: {law.name}")
