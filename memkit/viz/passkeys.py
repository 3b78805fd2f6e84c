"""What policies found of a number hidden in a text, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType

from memkit.passkey import Passkeys
from memkit.viz.html import fragment
from memkit.viz.tables import columns, with_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "html", "table"]

FOUND, LOST = "●", "·"


def figure(passkeys: Passkeys) -> Figure:
    """How many of the numbers each policy found, against what its memory takes."""
    from memkit.viz import figures, style

    (ax,), drawn = style.panels(1)
    points = [(entry.policy, entry.bytes, entry.found / entry.placements) for entry in passkeys.policies]
    figures.accuracy(points, ax, what=f"of {passkeys.settings['placements']} hidden numbers found, %")
    return drawn


TIMES = ("once", "twice")


def html(passkeys: Passkeys) -> str:
    """The table for a notebook."""
    return fragment(table(passkeys))


def table(passkeys: Passkeys) -> RenderableType:
    """A line per policy, those that found most first; a mark for each placement, the text's beginning first."""
    grid = columns("policy", "found", "nats per token", "memory\nMB", "by depth", align="lrrrl", gap=0)
    for entry in sorted(passkeys.policies, key=lambda entry: (-entry.found, entry.nats)):
        grid.add_row(
            entry.policy,
            f"{entry.found}/{entry.placements}",
            f"{entry.nats:.2f} ± {entry.nats_error:.2f}",
            f"{entry.bytes / 1e6:,.1f}",
            "".join(FOUND if found else LOST for _, found, _ in entry.by_depth),
        )
    s = passkeys.settings
    lines = [
        f"a five-digit number, said {TIMES[s.get('mentions', 2) - 1]}, among {s['tokens']:,} tokens of {s['text']}, "
        "asked for at their end",
        f"model: {s['model']}, prefill {s['prefill']}, rows {s['rows'] or 'as the policies say'}, seed {s['seed']}",
        "found: greedy decoding would say it exactly; nats: the loss of its tokens, and the standard error",
    ]
    if s["overrides"]:
        lines.append("set: " + ", ".join(f"{field}={value}" for field, value in s["overrides"].items()))
    return with_notes(grid, lines)
