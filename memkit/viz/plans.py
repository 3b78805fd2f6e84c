"""A plan: what becomes of each chunk that leaves the window."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from memkit.engine.inputs import Plan
from memkit.viz.html import fragment
from memkit.viz.tables import columns, with_notes

__all__ = ["html", "table"]

MOST = 12
"""Chunks shown of a row: the first ones, and the last."""


def table(plan: Plan) -> RenderableType:
    """A line per chunk of each row: its tokens, how many founded, joined and were dropped, and the slots after it.

    Numbers are means over key/value heads.
    """
    grid = columns("row", "tokens", "founded", "joined", "dropped", "slots")
    for row in range(len(plan.begin)):
        for line in _chunks(plan, row):
            grid.add_row(*line)
    heads = plan.slot.shape[1]
    return with_notes(grid, [f"tokens of each chunk that leaves; means over {heads} key/value heads"])


def html(plan: Plan) -> str:
    """The table for a notebook."""
    return fragment(table(plan))


def _chunks(plan: Plan, row: int) -> Iterator[tuple[str, ...]]:
    length, chunks = int(plan.length[row]), plan.slots.shape[1]
    size = -(-length // chunks) if chunks else 0
    for number in range(chunks):
        first, last = number * size, min(length, (number + 1) * size)
        if first >= length:
            return
        if MOST - 1 <= number < chunks - 1:
            if number == MOST - 1:
                yield (str(row), "…", "", "", "", "")
            continue
        founded, slot = plan.founded[row, :, first:last], plan.slot[row, :, first:last]
        heads = len(slot)
        counts = (int(founded.sum()), int(((slot >= 0) & ~founded).sum()), int((slot < 0).sum()))
        begin = int(plan.begin[row])
        words = (f"{count / heads:g}" if count % heads == 0 else f"{count / heads:.1f}" for count in counts)
        yield (str(row), f"{begin + first:,}–{begin + last - 1:,}", *words, f"{int(plan.slots[row, number]):,}")
