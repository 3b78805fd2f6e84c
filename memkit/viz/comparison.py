"""A comparison as a table, as HTML and as a figure, and the progress bar while it runs."""

from __future__ import annotations

import html as markup
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from memkit.errors import ModelError
from memkit.viz.tables import columns, with_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memkit.comparison import Comparison, Measurement
    from memkit.comparison import Progress as Report

__all__ = ["html", "plot", "progress_bar", "table"]

MARK = "●"
HEADERS = (
    ("", "policy"),
    ("memory", "MB"),
    ("peak", "MB"),
    ("rows,", "a head"),
    ("loss", "nats"),
    ("gap", "closed"),
    ("second", "text"),
    ("read", "tok/s"),
    ("decode", "ms"),
)


def table(comparison: Comparison) -> RenderableType:
    """The memory–loss front first, then the others, each sorted by memory; the settings below."""
    grid = columns(*(f"{above}\n{below}" for above, below in HEADERS), gap=0)
    for entry in _front_first(comparison):
        grid.add_row(*_cells(entry), style="bold" if entry.front else "")
    return with_notes(grid, _notes(comparison))


def html(comparison: Comparison) -> str:
    """The same table for a notebook."""
    heads = "".join(f"<th>{above}<br>{below}</th>" for above, below in HEADERS)
    rows: list[str] = []
    for entry in _front_first(comparison):
        tag = "th" if entry.front else "td"
        rows.append("<tr>" + "".join(f"<{tag}>{markup.escape(cell)}</{tag}>" for cell in _cells(entry)) + "</tr>")
    notes = "<br>".join(markup.escape(line) for line in _notes(comparison))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table><p><small>{notes}</small></p>"


def plot(comparison: Comparison, axes: Axes | None = None) -> Axes:
    """Loss against memory on a logarithmic axis. The front is a line: between its points, no policy was better."""
    if axes is None:
        try:
            from matplotlib import pyplot
        except ImportError:
            raise ModelError(
                "plotting needs matplotlib, which is not installed; run: pip install 'memkit-attention[notebook]'"
            ) from None
        _, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    entries = _by_memory(comparison)
    front = [entry for entry in entries if entry.front]
    axes.step([_megabytes(e) for e in front], [e.loss for e in front], where="post", color="C0", alpha=0.4, zorder=1)
    colors = ["C0" if entry.front else "0.55" for entry in entries]
    axes.scatter([_megabytes(e) for e in entries], [e.loss for e in entries], color=colors, zorder=2)
    axes.set_xscale("log", subs=[2, 5])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.18, y=0.1)
    for entry, rise in zip(entries, _label_rises(axes, entries), strict=True):
        axes.annotate(
            entry.policy,
            (_megabytes(entry), entry.loss),
            xytext=(7, rise),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="0.2" if entry.front else "0.5",
        )
    settings = comparison.settings
    axes.set_xlabel(f"memory after {settings['tokens']:,} tokens, MB")
    axes.set_ylabel(f"loss from token {settings['skip']:,} on, nats per token")
    axes.set_title(f"{settings['model']} reading {settings['text']}", fontsize=10)
    return axes


def _label_rises(axes: Axes, entries: list[Measurement], height: float = 10, width: float = 110) -> list[float]:
    """How far, in points, each label is lifted above its dot so that none lies on another; lowest dots first."""
    scale = 72 / axes.figure.dpi
    dots = [tuple(scale * axes.transData.transform((_megabytes(e), e.loss))) for e in entries]
    placed: list[tuple[float, float]] = []
    rises = [0.0] * len(entries)
    for index in sorted(range(len(dots)), key=lambda i: dots[i][1]):
        x, y = dots[index]
        lifted = y + height / 2
        for other_x, other_y in sorted(placed, key=lambda dot: dot[1]):
            if abs(other_x - x) < width and abs(other_y - lifted) < height:
                lifted = other_y + height
        placed.append((x, lifted))
        rises[index] = lifted - y
    return rises


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


def _notes(comparison: Comparison) -> list[str]:
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
    else:
        lines.append("gap closed: compare streaming-4-512 and full too to see it")
    lines.append("memory, peak: bytes held once the text is read; the most until the last decoded token")
    versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
    lines += [
        f"model: {s['model']}, {s['parameters'] / 1e6:.0f}M parameters, {s['dtype']}",
        f"text: {s['text']}, {s['tokens']:,} tokens, loss over the last {s['scored']:,}",
        *(
            [f"the first {s['skip']:,} tokens read in full, then compressed at once"]
            if s.get("prefill") == "full"
            else []
        ),
        *([f"second text: {s['second_text']}"] if s.get("second_text") else []),
        f"machine: {s['machine']}, {s['device']}, cores {s['cores']}, threads {s['threads']}",
        f"versions: {versions}",
        f"loaded in {s['load_seconds']:.0f} s; decode: median of {s['decoded']} tokens; seed {s['seed']}",
    ]
    if s["overrides"]:
        lines.append("set: " + ", ".join(f"{field}={value}" for field, value in s["overrides"].items()))
    if s["context"] is not None and s["tokens"] + s["decoded"] > s["context"]:
        lines.append(f"the model was trained for {s['context']:,} tokens; losses past them say little about memory")
    return lines
