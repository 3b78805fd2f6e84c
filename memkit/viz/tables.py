"""How memkit's tables are set up."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

__all__ = ["amount", "columns", "with_notes"]

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def columns(*heads: str, align: str = "", gap: int = 1) -> Table:
    """An empty table with a line under its head and nothing around it.

    align: a letter per column: l left, r right, w left and wrapped where the line is too long; left out: the first
    column on the left, the others, numbers, on the right. gap: spaces left of each column.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), pad_edge=False)
    for head, side in zip(heads, align or "l" + "r" * (len(heads) - 1), strict=True):
        table.add_column(head, justify="right" if side == "r" else "left", no_wrap=side != "w")
    return table


def with_notes(table: Table, notes: Iterable[str]) -> Group:
    """A table with lines of small print below."""
    return Group(table, *(Text(note, style="dim") for note in notes))


def amount(number: float, unit: str = "") -> str:
    """Three digits and a metric prefix: 1.02 P, 4.10 GB."""
    power = 0
    while number >= 999.5 and power < len(PREFIXES) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if power == 0 else f"{number:#.3g}".rstrip(".")
    return f"{digits} {PREFIXES[power]}{unit}".rstrip()
