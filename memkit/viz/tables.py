"""How memkit's tables are set up."""

from __future__ import annotations

from rich import box
from rich.table import Table

__all__ = ["empty_table"]


def empty_table(gap: int = 0) -> Table:
    """An empty table with a line under its head and nothing around it; gap: spaces left of each column."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), pad_edge=False)
