"""Timings as a table and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memkit.errors import ModelError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memkit.benchmark import Bench

__all__ = ["plot", "save", "table"]


def table(bench: Bench) -> RenderableType:
    """One row per policy, mode and length, with the settings below."""
    grid = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for index, head in enumerate(("policy", "mode", "tokens", "ms", "low–high", "× full", "of limit", "peak GB")):
        grid.add_column(head, justify="left" if index < 2 else "right", no_wrap=True)
    for row in bench.timings:
        grid.add_row(
            row.policy,
            row.mode,
            f" {row.tokens:,}",
            f" {row.seconds * 1e3:.3g}",
            f" {row.low * 1e3:.3g}–{row.high * 1e3:.3g}",
            f" {row.factor:.2f}",
            f" {row.limit_share:.0%}",
            "" if row.peak_bytes is None else f" {row.peak_bytes / 1e9:.2f}",
        )
    facts = ", ".join(f"{name} {value}" for name, value in bench.settings.items() if name != "versions")
    versions = ", ".join(f"{name} {version}" for name, version in bench.settings["versions"].items())
    return Group(grid, Text(f"{facts}; {versions}", style="dim"))


def plot(bench: Bench) -> Axes:
    """Factor against full attention over the number of tokens, a line per policy and mode."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise ModelError("figures need matplotlib; pip install 'memkit-attention[notebook]'") from None
    _, axes = pyplot.subplots(figsize=(7, 4.5))
    lines = sorted({(row.policy, row.mode) for row in bench.timings})
    for policy, mode in lines:
        rows = sorted((r for r in bench.timings if (r.policy, r.mode) == (policy, mode)), key=lambda r: r.tokens)
        style = {"forward": "-", "train": "--", "decode": ":"}[mode]
        axes.plot([r.tokens for r in rows], [r.factor for r in rows], style, marker="o", label=f"{policy}, {mode}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times as fast as full attention")
    axes.legend(fontsize="small", frameon=False)
    return axes


def save(bench: Bench, path: Path) -> None:
    """Draw the figure into a file of the kind its ending says."""
    figure = plot(bench).get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=150, bbox_inches="tight")
