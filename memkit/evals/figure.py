"""The figure of a sweep: accuracy against bytes held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memkit.errors import ModelError

__all__ = ["Point", "save_recall_figure"]


@dataclass(frozen=True)
class Point:
    """One policy: bytes that a sequence's memory holds, accuracy (mean over seeds, standard deviation, each seed's).

    learning_rate: the one that was best.
    """

    policy: str
    bytes: int
    accuracy: float
    spread: float
    each: tuple[float, ...]
    learning_rate: float


def save_recall_figure(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw accuracy against kilobytes held, a bar for the spread, a dot per seed; to a PNG, SVG or PDF.

    Raises `ModelError` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ModelError("a figure needs matplotlib, which is not installed; run: pip install matplotlib") from None
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for point in sorted(points, key=lambda each: each.bytes):
        size = point.bytes / 1e3
        bar = axes.errorbar(size, point.accuracy, yerr=point.spread, fmt="o", capsize=4, label=point.policy)
        axes.scatter([size] * len(point.each), point.each, s=10, alpha=0.5, color=bar.lines[0].get_color())
        axes.annotate(point.policy, (size, point.accuracy), textcoords="offset points", xytext=(7, 4), fontsize=8)
    axes.set(xscale="log", ylim=(-0.03, 1.05), xlabel="kilobytes held per sequence, all layers", ylabel="accuracy")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
