"""How well a model predicts under policies, against what their memories take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from memkit.comparison import Comparison
from memkit.errors import InputError
from memkit.viz.labels import at_ends, beside_points
from memkit.viz.style import NARROW, grid, is_dark, muted, new_axes, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["accuracy", "error_map", "front", "gap_closed", "loss_by_position"]

LOWEST = -100.0
"""Percent of the gap: what lies below is written at the edge."""


def front(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Loss against memory: a filled dot for each policy on the front, a hollow one for each other; the front a line.

    The line goes down at a point and level to the next: no policy was below and left of it. Policies whose loss is no
    finite number are left out, and named in the title.

    Raises `InputError` where no loss is a finite number.
    """
    drawn = [entry for entry in comparison.policies if math.isfinite(entry.loss)]
    if not drawn:
        raise InputError("a loss must be a finite number to be drawn, and no policy has one")
    ax = new_axes(ax)
    entries = sorted(drawn, key=lambda entry: (entry.bytes, entry.loss))
    best = [entry for entry in entries if entry.front]
    on, off = series(0), series(1)
    x, y = [entry.bytes / 1e6 for entry in best], [entry.loss for entry in best]
    ax.step(x, y, where="post", color=on.color, alpha=0.5, linewidth=1.2, zorder=1)
    ax.scatter(x, y, color=on.color, marker=on.marker, s=26, zorder=3, label="on the front")
    others = [entry for entry in entries if not entry.front]
    ax.scatter(
        [entry.bytes / 1e6 for entry in others], [entry.loss for entry in others], marker=off.marker, s=24, zorder=3,
        facecolors="none", edgecolors=off.color, label="another has less of both",
    )  # fmt: skip
    _megabytes(ax)
    said = comparison.settings
    ax.set_xlabel(f"memory after {said['tokens']:,} tokens, MB")
    ax.set_ylabel("loss, nats per token")
    left_out = [entry.policy for entry in comparison.policies if entry not in drawn]
    title = f"{said['model']}, loss from token {said['skip']:,} on"
    if left_out:
        title += f"; no finite loss: {', '.join(left_out)}"
    ax.set_title(title, color=muted(), fontsize=8, loc="left")
    ax.margins(x=0.16, y=0.14)
    grid(ax)
    if others:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=2, borderpad=0, handletextpad=0.2)
    ordered = [*best, *others]
    beside_points(
        ax,
        [(entry.bytes / 1e6, entry.loss) for entry in ordered],
        [entry.policy for entry in ordered],
        [on.color if entry.front else off.color for entry in ordered],
        avoid=_along(x, y),
    )
    return ax


def gap_closed(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """The share of the gap between StreamingLLM and full attention that each policy closes, with its standard error.

    Shares below −100 % stand at the left edge, with an arrow and their number.

    Raises `InputError` where `streaming-4-512` or `full` was not compared.
    """
    entries = sorted(
        (entry for entry in comparison.policies if entry.gap_closed is not None),
        key=lambda entry: entry.gap_closed or 0.0,
    )
    if not entries:
        raise InputError("the gap closed needs streaming-4-512 and full among the policies; compare them too")
    ax = new_axes(ax, (NARROW, 0.8 + 0.36 * len(entries)))
    texts = [[(entry.gap_closed, entry.gap_error) for entry in entries]]
    if any(entry.second_gap_closed is not None for entry in entries):
        texts.append([(entry.second_gap_closed, entry.second_gap_error) for entry in entries])
    shares = [100 * share for text in texts for share, _ in text if share is not None]
    ax.set_xlim(max(LOWEST - 8, min(-12.0, min(shares) - 12)), max(118.0, max(shares) + 12))
    for number, text in enumerate(texts):
        _shares(ax, number, text, rise=(0.2 if number else -0.2) if len(texts) > 1 else 0.0)
    for end in (0, 100):
        ax.axvline(end, color=muted(), linewidth=0.8, zorder=1)
    ax.set_ylim(-0.6, len(entries) - 0.4)
    ax.set_yticks(range(len(entries)), [entry.policy for entry in entries])
    ax.set_xlabel("gap closed, % (0: streaming-4-512, 100: full)")
    grid(ax, "x")
    if len(texts) > 1:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0, handletextpad=0.4)
    return ax


def _shares(ax: Axes, number: int, text: list[tuple[float | None, float | None]], rise: float) -> None:
    """One text's shares: a mark in each policy's row, with its error."""
    look = series(number)
    dots = [(row - rise, 100 * s, 100 * (e or 0)) for row, (s, e) in enumerate(text) if s is not None]
    inside = [dot for dot in dots if dot[1] >= LOWEST]
    rows, shares, errors = zip(*inside, strict=True) if inside else ((), (), ())
    ax.errorbar(
        shares, rows, xerr=errors, color=look.color, marker=look.marker, linestyle="none", linewidth=1, markersize=4.5,
        markerfacecolor="none" if number else look.color, label="second text" if number else "first text",
    )  # fmt: skip
    for row, share, _ in dots:
        if share < LOWEST:
            ax.text(LOWEST - 6, row, f"◂ {share:.0f} %", color=look.color, fontsize=7, va="center")


def loss_by_position(
    losses: Mapping[str, Sequence[float]], ax: Axes | None = None, *, start: int = 0, parts: int = 16
) -> Axes:
    """Loss along a text: the mean of each of some parts, with a band of one standard error; a line per policy.

    losses: nats at each scored position, of each policy, all at the same positions. start: the first position.
    parts: how many means are drawn.

    Raises `InputError` for policies with unequally many positions, or fewer than two to a part.
    """
    ax = new_axes(ax)
    each = {name: np.asarray(loss, dtype=float) for name, loss in losses.items()}
    lengths = {len(loss) for loss in each.values()}
    if len(lengths) != 1 or min(lengths) < 2 * parts:
        raise InputError(
            f"losses must be of the same positions for all policies, at least {2 * parts} of them, got "
            f"{', '.join(str(length) for length in sorted(lengths)) or 'none'}"
        )
    edges = np.linspace(0, lengths.pop(), parts + 1).astype(int)
    middles = start + (edges[:-1] + edges[1:]) / 2
    ends: list[tuple[float, str, str]] = []
    for number, (name, loss) in enumerate(each.items()):
        cut = [loss[low:high] for low, high in pairwise(edges)]
        mean = np.array([part.mean() for part in cut])
        error = np.array([part.std(ddof=1) / len(part) ** 0.5 for part in cut])
        look = series(number)
        ax.fill_between(middles, mean - error, mean + error, color=look.color, alpha=0.16, linewidth=0)
        ax.plot(middles, mean, color=look.color, marker=look.marker, markersize=3.5, label=name)
        ends.append((float(mean[-1]), name, look.color))
    ax.set(xlabel="position in the text, tokens", ylabel="loss, nats per token")
    grid(ax)
    at_ends(ax, ends)
    return ax


def error_map(errors: Any, ax: Axes | None = None, *, label: str = "relative error of the output") -> Axes:
    """A number per layer and head as a heat map: what a policy changes, layer by layer.

    errors: [layers, heads], 0 or more; of `memkit.viz.layers.output_errors`, for instance. label: what is told.
    """
    ax = new_axes(ax, (6.0, 2.4))
    image = np.asarray(errors, dtype=float).T
    if image.ndim != 2 or not image.size:
        raise InputError(f"errors must be numbers [layers, heads], got an array of shape {image.T.shape}")
    heads, layers = image.shape
    shown = ax.imshow(
        image, aspect="auto", cmap="cividis" if is_dark() else "cividis_r", vmin=0, origin="lower",
        interpolation="nearest",
    )  # fmt: skip
    ax.set(xlabel="layer", ylabel="head")
    ax.set_xticks(range(0, layers, max(1, layers // 10)))
    ax.set_yticks(range(0, heads, max(1, heads // 5)))
    bar = ax.figure.colorbar(shown, ax=ax, pad=0.02, aspect=18)
    bar.set_label(label)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return ax


def accuracy(
    points: Sequence[tuple[str, int, float]],
    ax: Axes | None = None,
    *,
    what: str = "found, %",
    chance: float = 0.0,
    spreads: Sequence[float] = (),
) -> Axes:
    """Accuracy against memory: a dot for each policy, and its name; policies of one name, one after the other, are a
    line, named at its end.

    points: name, bytes, and the share that was right, 0 to 1. what: the axis's words. chance: the share that guessing
    gives, drawn as a line where it is not 0. spreads: the length of each dot's bar, up and down; none: no bars.

    Raises `InputError` where there are no points, or not as many spreads.
    """
    if not points:
        raise InputError("points must be one (name, bytes, share) at least, got none")
    if spreads and len(spreads) != len(points):
        raise InputError(f"spreads must be as many as the points, {len(points)}, got {len(spreads)}")
    ax = new_axes(ax)
    ends: list[tuple[str, float, float]] = []
    for number, (name, group) in enumerate(groupby(enumerate(points), key=lambda each: each[1][0])):
        own, of_name = series(number), list(group)
        x, y = [size / 1e6 for _, (_, size, _) in of_name], [100 * share for _, (_, _, share) in of_name]
        if len(x) > 1:
            ax.plot(x, y, color=own.color, linewidth=1, zorder=2)
        if spreads:
            bars = [100 * spreads[index] for index, _ in of_name]
            ax.errorbar(x, y, yerr=bars, color=own.color, capsize=3, linestyle="none", zorder=2)
        ax.scatter(x, y, color=own.color, marker=own.marker, s=28, zorder=3)
        ends.append((name, x[-1], y[-1]))
    if chance:
        ax.axhline(100 * chance, color=muted(), linewidth=0.8, linestyle="--")
    _megabytes(ax)
    ax.set(xlabel="memory, MB", ylabel=what, ylim=(-8, 108))
    ax.margins(x=0.18)
    grid(ax)
    beside_points(
        ax,
        [(x, y) for _, x, y in ends],
        [name for name, _, _ in ends],
        [series(number).color for number in range(len(ends))],
    )
    return ax


def _along(x: list[float], y: list[float]) -> list[tuple[float, float]]:
    """Points along a line that goes level and then down from each point to the next, x on a logarithmic axis."""
    found: list[tuple[float, float]] = []
    for (left, above), (right, below) in pairwise(zip(x, y, strict=True)):
        found += [(float(at), above) for at in np.geomspace(left, right, 24)[1:]]
        found += [(right, float(at)) for at in np.linspace(above, below, 8)[1:-1]]
    return found


def _megabytes(ax: Axes) -> None:
    """Memory along x, on a logarithmic axis with numbers that people write."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
