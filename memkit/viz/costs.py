"""Costs as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from memkit.costing import Cost
from memkit.viz.tables import columns, with_notes

__all__ = ["amount", "cells", "table"]

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def table(costs: Sequence[Cost]) -> RenderableType:
    """One line per policy, one block per length; all for one shape."""
    grid = columns(
        "policy", "slots", "window", "memory\nread", "memory\nat most", "prefill\nFLOPs", "a token\nFLOPs", "grows\nas"
    )
    for tokens in sorted({cost.tokens for cost in costs}):
        grid.add_section()
        grid.add_row(Text(f"{tokens:,} tokens", style="bold"))
        for cost in costs:
            if cost.tokens == tokens:
                grid.add_row(cost.policy, *cells(cost), f"N^{cost.exponent:.2f}")
    notes = [
        f"for {costs[0].shape}; slots and window of each head",
        "FLOPs: attention and routing, of the prefill and of one token decoded after it",
        "grows as: the prefill from 4k to 1M tokens",
    ]
    return with_notes(grid, notes)


def cells(cost: Cost) -> tuple[str, ...]:
    """Slots, window, memory after reading and at most, operations of a prefill and of one token."""
    numbers = (f"{cost.slots:,}", f"{cost.window:,}", amount(cost.bytes, "B"), amount(cost.peak_bytes, "B"))
    return (*numbers, amount(cost.prefill.total), amount(cost.decode.total))


def amount(number: float, unit: str = "") -> str:
    """Three digits and a metric prefix: 1.02 P, 4.10 GB."""
    power = 0
    while number >= 999.5 and power < len(PREFIXES) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if power == 0 else f"{number:#.3g}".rstrip(".")
    return f"{digits} {PREFIXES[power]}{unit}".rstrip()
