"""Timings as a table and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

from memkit.viz import style
from memkit.viz.html import fragment
from memkit.viz.tables import columns, with_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memkit.benchmark import Bench

__all__ = ["html", "plot", "save", "table"]


def table(bench: Bench) -> RenderableType:
    """One row per policy, mode and length, with the settings below."""
    heads = ("policy", "mode", "tokens", "ms", "low–high", "×\nfull", "of\nlimit", "peak\nGB")
    grid = columns(*heads, align="llrrrrrr", gap=0)
    for row in bench.timings:
        grid.add_row(
            row.policy,
            row.mode,
            f" {row.tokens:,}",
            f" {_milliseconds(row.seconds)}",
            f" {_milliseconds(row.low)}–{_milliseconds(row.high)}",
            f" {row.factor:.2f}",
            f" {row.limit_share:.0%}",
            "" if row.peak_bytes is None else f" {row.peak_bytes / 1e9:.2f}",
        )
    facts = ", ".join(f"{name} {value}" for name, value in bench.settings.items() if name != "versions")
    versions = ", ".join(f"{name} {version}" for name, version in bench.settings["versions"].items())
    return with_notes(grid, [f"{facts}; {versions}"])


def _milliseconds(seconds: float) -> str:
    """Three digits, or all before the point where these are more."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.9995 else f"{seconds * 1e3:.3g}"


def html(bench: Bench) -> str:
    """The table for a notebook."""
    return fragment(table(bench))


def plot(bench: Bench) -> Axes:
    """Factors against full attention as small multiples (`figures.factors`); the first panel's axes."""
    from memkit.viz.figures import factors

    return factors(bench)


def save(bench: Bench, path: Path) -> None:
    """Draw the figure into a file of the kind its ending says."""
    with style.theme():
        figure = plot(bench).get_figure(root=True)
        assert figure is not None
        style.save(figure, path)
