"""A memory: what it holds of each row."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from memkit.memory import Memory
from memkit.viz.html import fragment
from memkit.viz.tables import amount, columns, with_notes

__all__ = ["html", "table"]


def table(memory: Memory) -> RenderableType:
    """A line per row: tokens read, tokens in the window, slots, and how many tokens a slot holds."""
    name = memory.policy.name or "a policy without a name"
    if memory.lost or memory.taken:
        return Text(f"a memory of {name}, {'lost: ' + memory.lost if memory.lost else 'taken over by a later call'}")
    grid = columns("row", "tokens read", "window", "slots", "tokens in a slot", "most")
    counts, slots = memory.counts, memory.slots
    for row, seen in enumerate(memory.seen.tolist()):
        used = counts[row][counts[row] > 0]
        inside = (f"{used.double().mean():.1f}", f"{int(used.max()):,}") if len(used) else ("–", "–")
        each = sorted(set(slots[row].reshape(-1).tolist()))
        live = f"{each[0]:,}" if len(each) == 1 else f"{each[0]:,}–{each[-1]:,}"
        grid.add_row(str(row), f"{seen:,}", f"{int(memory.held_rows[row]):,}", live, *inside)
    dtype = str(memory.dtype).removeprefix("torch.")
    keys, values = memory.head_widths
    note = (
        f"{memory.heads} key/value heads, keys of {keys} and values of {values} channels, {dtype} on {memory.device}; "
        f"{amount(memory.bytes, 'B')} in all"
    )
    return Group(Text(f"memory of {name}", style="bold"), with_notes(grid, [note]))


def html(memory: Memory) -> str:
    """The table for a notebook."""
    return fragment(table(memory))
