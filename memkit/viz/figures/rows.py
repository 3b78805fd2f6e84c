"""A memory over time: how full its slots are, how old, and with which score rows stayed or went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memkit.viz.style import grid, is_dark, muted, new_axes, series
from memkit.viz.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["age", "occupancy", "scores"]

MOST_DOTS = 4000
"""Dots drawn of a group at most; evenly spaced ones of them, where there are more."""


def occupancy(traced: Trace, ax: Axes | None = None) -> Axes:
    """How many tokens each slot holds as the text goes on: a row per slot, the first slot below, a column per step."""
    ax = new_axes(ax)
    each = [traced.counts(look) for look in range(len(traced.tokens_read))]
    _heat(ax, traced, each, "tokens in the slot", from_one=True)
    return ax


def age(traced: Trace, ax: Axes | None = None) -> Axes:
    """How long ago the tokens of each slot were read, on average, as the text goes on; drawn as `occupancy` is."""
    ax = new_axes(ax)
    _heat(ax, traced, [traced.ages(look) for look in range(len(traced.tokens_read))], "mean age, tokens")
    return ax


def scores(traced: Trace, ax: Axes | None = None) -> Axes:
    """The score of every candidate for a row, chunk by chunk: those that got or kept one, and those that did not.

    Candidates are a chunk's tokens, and the slots where slots compete with them. There is nothing to draw where nobody
    is scored: the axes say so.
    """
    ax = new_axes(ax)
    ax.set(xlabel="tokens read", ylabel="score (high: stays)")
    if not traced.decisions:
        ax.text(0.5, 0.5, "nobody is scored", transform=ax.transAxes, ha="center", color=muted())
        ax.set(xticks=[], yticks=[])
        return ax
    chosen, others = _dots(traced, True), _dots(traced, False)
    span = max(1, traced.tokens_read[-1]) / max(len(traced.decisions), 1)
    shown = np.concatenate((chosen[:, 1], others[:, 1]))
    if shown.min() > 0 and shown.max() > 50 * np.median(shown):
        ax.set_yscale("log")
    keep, lose = series(0), series(1)
    if len(others):
        words = "joins a slot" if traced.joins else "is forgotten"
        ax.scatter(
            others[:, 0] + 0.12 * span, others[:, 1], s=9, marker="x", color=lose.color, linewidths=0.6, alpha=0.7,
            label=words,
        )  # fmt: skip
    if len(chosen):
        ax.scatter(
            chosen[:, 0] - 0.12 * span, chosen[:, 1], s=9, marker="o", facecolors="none", edgecolors=keep.color,
            linewidths=0.6, alpha=0.7, label="has a row of its own",
        )  # fmt: skip
    grid(ax, "y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, markerscale=1.5)
    return ax


def _dots(traced: Trace, chosen: bool) -> np.ndarray:
    """Tokens read and score of the candidates that were chosen, or were not, [n, 2]."""
    parts = [
        np.stack((np.full(int((one.chosen == chosen).sum()), one.tokens_read), one.score[one.chosen == chosen]), axis=1)
        for one in traced.decisions
    ]
    dots = np.concatenate(parts)
    dots = dots[np.isfinite(dots[:, 1])]
    return dots[:: max(1, -(-len(dots) // MOST_DOTS))]


def _heat(ax: Axes, traced: Trace, each: list[np.ndarray], label: str, from_one: bool = False) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    most = max(len(column) for column in each)
    ax.set(xlabel="tokens read", ylabel="slot")
    if most == 0:
        ax.text(0.5, 0.5, "no slots", transform=ax.transAxes, ha="center", color=muted())
        ax.set(xticks=[], yticks=[])
        return
    image = np.full((most, len(each)), np.nan)
    for step, column in enumerate(each):
        image[: len(column), step] = column
    edges = np.array([0, *traced.tokens_read])
    norm = LogNorm(1, max(2.0, float(np.nanmax(image)))) if from_one else None
    shown = ax.pcolormesh(
        edges, np.arange(most + 1) - 0.5, np.ma.masked_invalid(image), norm=norm,
        cmap="cividis" if is_dark() else "cividis_r", rasterized=True,
    )  # fmt: skip
    bar = ax.figure.colorbar(shown, ax=ax, pad=0.02, aspect=24)
    bar.set_label(label)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if traced.sinks:
        ax.axhline(traced.sinks - 0.5, color=muted(), linewidth=0.7, linestyle=":")
