"""Costs as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from memkit.costing import Cost
from memkit.viz.html import fragment
from memkit.viz.tables import amount, columns, with_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DRAWN_LENGTHS", "amount", "cells", "figure", "html", "table"]

DRAWN_LENGTHS = tuple(1024 << i for i in range(11))
"""Tokens at which a curve is drawn: 1k, 2k … 1M."""


def table(costs: Sequence[Cost]) -> RenderableType:
    """One line per policy, one block per length, and what memories hold, and when; all for one shape."""
    grid = columns("policy", "slots", "window", "memory", "prefill\nFLOPs", "a token\nFLOPs", "grows\nas")
    for tokens in sorted({cost.tokens for cost in costs}):
        grid.add_section()
        grid.add_row(Text(f"{tokens:,} tokens", style="bold"))
        for cost in costs:
            if cost.tokens == tokens:
                grid.add_row(cost.policy, *cells(cost), f"N^{cost.exponent:.2f}")
    notes = [
        f"for {costs[0].shape}; slots and window of each head, memory after reading",
        "FLOPs: attention and routing, of the prefill and of one token decoded after it",
        "grows as: the prefill from 4k to 1M tokens",
    ]
    return Group(with_notes(grid, notes), Text(), _held(costs))


def _held(costs: Sequence[Cost]) -> RenderableType:
    """Bytes after reading, while decoding, and at most, over those of the rows' keys and values."""
    grid = columns("policy", "tokens", "reading", "decoding", "peak", "× its rows")
    for cost in costs:
        shape, numbers = cost.shape, (cost.bytes, cost.decoding_bytes, cost.peak_bytes)
        size = int(shape.dtype.strip("bfloat")) // 8
        row = shape.layers * shape.rows * shape.kv_heads * (shape.head_width + shape.value_width) * size
        share = cost.peak_bytes / ((cost.slots + cost.window) * row)
        grid.add_row(cost.policy, f"{cost.tokens:,}", *(amount(each, "B") for each in numbers), f"{share:.2f}")
    notes = [
        "held: what is allocated after the text was read, and at most while a chunk more is decoded",
        "× its rows: the peak over keys and values of the slots and the window that there are after reading",
    ]
    return with_notes(grid, notes)


def figure(costs: Sequence[Cost]) -> Figure:
    """Memory against tokens, and operations of the prefill, each with the power of N that it grows with."""
    from memkit.viz import figures, style

    (left, right), drawn = style.panels(2)
    figures.growth(costs, left)
    figures.cost_curves(costs, right)
    return drawn


def html(cost: Cost) -> str:
    """One cost as its table, for a notebook."""
    return fragment(table([cost]))


def cells(cost: Cost) -> tuple[str, ...]:
    """Slots, window, memory after reading, operations of a prefill and of one token."""
    numbers = (f"{cost.slots:,}", f"{cost.window:,}", amount(cost.bytes, "B"))
    return (*numbers, amount(cost.prefill.total), amount(cost.decode.total))
