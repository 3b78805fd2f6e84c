"""Timings as a table and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

from memkit.errors import ModelError
from memkit.viz.tables import columns, with_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memkit.benchmark import Bench

__all__ = ["plot", "save", "table"]


def table(bench: Bench) -> RenderableType:
    """One row per policy, mode and length, with the settings below."""
    heads = ("policy", "mode", "tokens", "ms", "low–high", "× full", "of limit", "peak GB")
    grid = columns(*heads, align="llrrrrrr", gap=0)
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
    return with_notes(grid, [f"{facts}; {versions}"])


def plot(bench: Bench) -> Axes:
    """Factor against full attention over the number of tokens: a panel per mode, a line per policy; the first panel."""
    try:
        from matplotlib import colormaps, pyplot
    except ModuleNotFoundError:
        raise ModelError("figures need matplotlib; pip install 'memkit-attention[notebook]'") from None
    names = {"forward": "prefill", "train": "forward and backward", "decode": "one decoded token"}
    modes = [mode for mode in names if any(row.mode == mode for row in bench.timings)]
    policies = list(dict.fromkeys(row.policy for row in bench.timings))
    colours = [colormaps["tab20"](index % 20) for index in range(len(policies))]
    figure, panels = pyplot.subplots(
        1, len(modes), figsize=(3.6 * len(modes) + 2, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, mode in zip(panels[0], modes, strict=True):
        for policy, colour in zip(policies, colours, strict=True):
            rows = [row for row in bench.timings if (row.policy, row.mode) == (policy, mode)]
            rows.sort(key=lambda row: row.tokens)
            panel.plot([r.tokens for r in rows], [r.factor for r in rows], color=colour, marker="o", label=policy)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=names[mode])
    panels[0][0].set(ylabel="times as fast as full attention")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", fontsize="small", frameon=False)
    return panels[0][0]


def save(bench: Bench, path: Path) -> None:
    """Draw the figure into a file of the kind its ending says."""
    figure = plot(bench).get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=150, bbox_inches="tight")
