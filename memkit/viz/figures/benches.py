"""Timings as small multiples: a panel for each kind of policy and each mode, few lines in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from memkit.benchmark import Bench, Timing
from memkit.viz.labels import spread
from memkit.viz.style import NARROW, grid, muted, new_axes, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KINDS", "factors"]

MODES = {"forward": "prefill", "train": "forward and backward", "decode": "one decoded token"}

KINDS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("exact tokens alone", lambda name: name.startswith(("full", "window", "streaming", "block-window"))),
    ("pooled blocks", lambda name: "block-mean" in name),
    ("slots of alike tokens, learned", lambda name: name.startswith(("kvm", "ovq"))),
    ("slots of alike tokens, nothing learned", lambda name: name.startswith("untrained-kvm")),
    ("memory that sees its readers", lambda name: name.startswith("untrained-observed")),
    ("eviction by keys alone", lambda name: name.startswith(("knorm", "keydiff"))),
    ("slots that compete", lambda name: True),
)
"""Kinds of policies: what a panel is called, and whose names belong there, the first that fits."""


def factors(bench: Bench, ax: Axes | None = None) -> Axes:
    """How many times as fast as full attention, over tokens: a row of panels per kind of policy, a column per mode.

    The dotted line of a policy is its limit, where it is known: as fast as its arithmetic alone would be. Below 1, full
    attention is faster. ax: is divided into the panels; left out: a new figure. The first panel is returned.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    modes = [mode for mode in MODES if any(row.mode == mode for row in bench.timings)]
    names = list(dict.fromkeys(row.policy for row in bench.timings))
    kinds = _kinds(names)
    height = sum(0.55 + 0.21 * max(4, len(members)) for _, members in kinds) + 0.5
    outer: Any = new_axes(ax, (max(NARROW, 2.0 * len(modes) + 1.6), height))
    figure, spec = outer.figure, outer.get_subplotspec()
    outer.set_axis_off()
    rows = spec.subgridspec(
        len(kinds), len(modes), height_ratios=[0.55 + 0.21 * max(4, len(members)) for _, members in kinds]
    )
    lengths = sorted({row.tokens for row in bench.timings})
    shares = (share for row in bench.timings for share in (row.factor, _limit(row)))
    every = [share for share in shares if np.isfinite(share)]
    low, high = min(0.8, *every) / 1.15, max(1.25, *every) * 1.15
    panels: list[list[Axes]] = []
    for number, (kind, members) in enumerate(kinds):
        row_of = [figure.add_subplot(rows[number, column]) for column in range(len(modes))]
        panels.append(row_of)
        for panel, mode in zip(row_of, modes, strict=True):
            _panel(panel, [row for row in bench.timings if row.mode == mode], members)
            panel.set(xscale="log", yscale="log", ylim=(low, high), xlim=_around(lengths))
            panel.xaxis.set_major_locator(LogLocator(base=4))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _tokens(tokens)))
            panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 3)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda factor, _: f"{factor:g}"))
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_minor_locator(NullLocator())
                axis.set_minor_formatter(NullFormatter())
            panel.tick_params(labelleft=panel is row_of[0], labelbottom=number == len(kinds) - 1)
            if number == 0:
                panel.text(0.5, 1.3, MODES[mode], transform=panel.transAxes, ha="center", fontsize=9)
            grid(panel)
        row_of[0].set_ylabel("× full", fontsize=8)
        row_of[0].set_title(kind, fontsize=8, color=muted(), loc="left")
    panels[-1][len(modes) // 2].set_xlabel("tokens")
    figure.draw_without_rendering()
    for row_of, (_, members) in zip(panels, kinds, strict=True):
        _names(row_of[-1], members)
    return panels[0][0]


def _panel(panel: Axes, timings: list[Timing], members: list[str]) -> None:
    for number, name in enumerate(members):
        rows = sorted((row for row in timings if row.policy == name), key=lambda row: row.tokens)
        look = series(number)
        tokens = [row.tokens for row in rows]
        panel.plot(tokens, [_limit(row) for row in rows], color=look.color, linestyle=":", linewidth=1)
        panel.plot(tokens, [row.factor for row in rows], color=look.color, marker=look.marker, markersize=4, label=name)
    panel.axhline(1, color=muted(), linewidth=0.8)


def _names(panel: Axes, members: list[str]) -> None:
    """The policies of a row of panels at its right, each at its line's end, with its mark."""
    ends = {str(line.get_label()): float(np.asarray(line.get_ydata())[-1]) for line in panel.get_lines()}
    extent = panel.get_window_extent()
    scale: Any = panel.figure
    wanted = [float(panel.transData.transform((1, ends.get(name, 1.0)))[1]) for name in members]
    placed = spread(wanted, 1.35 * 7.5 * scale.dpi / 72, extent.y0, extent.y1)
    for number, (name, y) in enumerate(zip(members, placed, strict=True)):
        look, up = series(number), (y - extent.y0) / extent.height
        panel.plot(
            [1.06], [up], transform=panel.transAxes, color=look.color, marker=look.marker, markersize=4, clip_on=False
        )
        panel.text(1.12, up, name, transform=panel.transAxes, va="center", fontsize=7.5, color=look.color)


def _kinds(names: list[str]) -> list[tuple[str, list[str]]]:
    """The kinds that there are, with their members; a kind's policies keep their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(next(kind for kind, belongs in KINDS if belongs(name)), []).append(name)
    return [(kind, found[kind]) for kind, _ in KINDS if kind in found]


def _limit(row: Timing) -> float:
    """The factor that a policy would reach were it as fast as its arithmetic."""
    return row.full_seconds / row.limit_seconds


def _around(lengths: list[int]) -> tuple[float, float]:
    return lengths[0] / 1.35, lengths[-1] * 1.35


def _tokens(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"
