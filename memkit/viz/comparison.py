"""A comparison as a table, as HTML and as a figure, and the progress bar while it runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from memkit.comparison.against import BASELINE, STREAMING
from memkit.viz.html import fragment
from memkit.viz.tables import columns, with_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memkit.comparison import Comparison, Measurement
    from memkit.comparison import Progress as Report

__all__ = ["figure", "html", "notes", "plot", "progress_bar", "table"]

MARK = "●"
WITHOUT_NUMBA = "without Numba policies whose slots compete read slower: pip install 'memkit-attention[fast]'"
GAP, SECOND = ("gap", "closed"), ("second", "text")
HEADERS = (
    ("", "policy"),
    ("memory", "MB"),
    ("peak", "MB"),
    ("rows,", "a head"),
    ("loss", "nats"),
    GAP,
    SECOND,
    ("read", "tok/s"),
    ("decode", "ms"),
)


def table(comparison: Comparison) -> RenderableType:
    """The memory–loss front first, then the others, each sorted by memory; the settings below.

    A share of the gap that is known of no policy has no column.
    """
    entries = _front_first(comparison)
    gap = any(entry.gap_closed is not None for entry in entries)
    second = any(entry.second_gap_closed is not None for entry in entries)
    absent = {head for head, known in ((GAP, gap), (SECOND, second)) if not known}
    grid = columns(*("\n".join(head) for head in HEADERS if head not in absent), gap=0)
    for entry in entries:
        cells = (cell for head, cell in zip(HEADERS, _cells(entry), strict=True) if head not in absent)
        grid.add_row(*cells, style="bold" if entry.front else "")
    return with_notes(grid, notes(comparison))


def html(comparison: Comparison) -> str:
    """The table for a notebook."""
    return fragment(table(comparison))


def plot(comparison: Comparison, axes: Axes | None = None) -> Axes:
    """Loss against memory: `figures.front`."""
    from memkit.viz.figures import front

    return front(comparison, axes)


def figure(comparison: Comparison) -> Figure:
    """All that a comparison shows: loss against memory, and the gap closed where it is known."""
    from memkit.viz import figures, style

    gaps = [entry for entry in comparison.policies if entry.gap_closed is not None]
    (first, *rest), drawn = style.panels(2 if gaps else 1, 0.9 + 0.36 * max(8, len(gaps)))
    figures.front(comparison, first)
    for ax in rest:
        figures.gap_closed(comparison, ax)
    return drawn


@contextmanager
def progress_bar(policies: int, console: Console | None = None) -> Generator[Report]:
    """A bar over so many policies, on stderr and gone when it is done; gives what `compare(progress=…)` wants."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}"), TimeElapsedColumn())
    console = console or Console(file=sys.stderr)  # the stream of now: loading a model redirects the name to silence it
    with Progress(*columns, console=console, transient=True) as bar:
        task: TaskID = bar.add_task("loading the model", total=policies, step="")
        labels: list[str] = []

        def report(policy: str, done: int, total: int) -> None:
            if policy not in labels:
                labels.append(policy)
            finished = len(labels) - 1 + done / total
            bar.update(task, completed=finished, description=policy, step=f"{len(labels)}/{policies}")

        yield report


def _by_memory(comparison: Comparison) -> list[Measurement]:
    return sorted(comparison.policies, key=lambda entry: (entry.bytes, entry.loss))


def _front_first(comparison: Comparison) -> list[Measurement]:
    return sorted(_by_memory(comparison), key=lambda entry: not entry.front)


def _megabytes(entry: Measurement) -> float:
    return entry.bytes / 1e6


def _cells(entry: Measurement) -> tuple[str, ...]:
    return (
        f"{MARK if entry.front else ' '} {entry.policy}",
        f"{_megabytes(entry):,.1f}",
        f"{entry.peak_bytes / 1e6:,.1f}",
        f"{entry.slots + entry.window:,}",
        f"{entry.loss:.3f}",
        _share(entry.gap_closed),
        _share(entry.second_gap_closed),
        f"{entry.tokens_per_second:,.0f}",
        f"{entry.decode_ms:.0f}",
    )


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def notes(comparison: Comparison) -> list[str]:
    """What the marks mean, and the settings."""
    s = comparison.settings
    lines = [f"{MARK} on the front: no other policy has at most its memory and at most its loss"]
    errors = [entry.gap_error for entry in comparison.policies if entry.gap_error is not None]
    second = [entry.second_gap_error for entry in comparison.policies if entry.second_gap_error is not None]
    if errors:
        lines.append(
            "gap closed: how much of the loss from streaming-4-512 (0%) to full (100%) is saved; "
            f"standard errors up to {max(errors + second):.0%}"
        )
    elif {BASELINE, STREAMING} <= (losses := {entry.policy: entry.loss for entry in comparison.policies}).keys():
        numbers = math.isfinite(losses[BASELINE]) and math.isfinite(losses[STREAMING])
        why = "full predicts no better than streaming-4-512 here" if numbers else "a loss is no finite number"
        lines.append(f"gap closed: unknown, for {why}")
    else:
        lines.append("gap closed: compare streaming-4-512 and full too to see it")
    lines.append("memory, peak: bytes held once the text is read; the most until the last decoded token")
    versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
    millions = s["parameters"] / 1e6
    lines += [
        f"model: {s['model']}, {millions:.{0 if millions >= 10 else 1}f}M parameters, {s['dtype']}",
        f"text: {s['text']}, {s['tokens']:,} tokens, loss over the last {s['scored']:,}",
        *(
            [f"the first {s['skip']:,} tokens read in full, then compressed at once"]
            if s.get("prefill") == "full"
            else []
        ),
        *([f"second text: {s['second_text']}"] if s.get("second_text") else []),
        f"machine: {s['machine']}, {s['device']}, cores {s['cores']}, threads {s['threads']}",
        f"versions: {versions}",
        *([WITHOUT_NUMBA] if s["device"] == "cpu" and "numba" not in s["versions"] else []),
        f"loaded in {s['load_seconds']:.0f} s; decode: median of {s['decoded']} tokens; seed {s['seed']}",
    ]
    if s["overrides"]:
        lines.append("set: " + ", ".join(f"{field}={value}" for field, value in s["overrides"].items()))
    if s["context"] is not None and s["tokens"] + s["decoded"] > s["context"]:
        lines.append(f"the model was trained for {s['context']:,} tokens; losses past them say little about memory")
    return lines
