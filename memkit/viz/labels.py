"""Labels that lie on no other label: placed by what they take up, not hoped for.

Sizes are asked of the figure as it is laid out now, so axes get their limits, scales and titles before their labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from memkit.viz.style import muted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation, Text

__all__ = ["at_ends", "beside_points"]

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""

NEAR = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1), (-1, 0))
"""Where a label may stand as seen from its point, the best place first: right, above right, …"""

RINGS = (7, 11, 16, 22, 30, 40, 52, 66, 82, 100, 120, 142, 166, 192, 220)
"""How far from its point, in points of type, the nearest first."""

LEADER = 16
"""From so many points on, a thin line leads from the point to its label."""

PAD, DOT = 1.0, 4.0
"""Points that stay free around a label; half the size of a point's mark."""


def beside_points(
    ax: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colors: Sequence[str] | None = None,
    avoid: Iterable[tuple[float, float]] = (),
) -> list[Annotation]:
    """Write a text beside each point, where it lies on no other text and on no point, inside the axes.

    points, avoid: data coordinates; nothing is written over those of `avoid`. colors: one per text.
    """
    figure: Any = ax.get_figure(root=True)
    figure.draw_without_rendering()
    scale, inside = figure.dpi / 72, _box(ax.get_window_extent())
    centres = [tuple(ax.transData.transform(point)) for point in (*points, *avoid)]
    taken = [(x - DOT * scale, y - DOT * scale, x + DOT * scale, y + DOT * scale) for x, y in centres]
    made: list[Annotation] = []
    for index, (point, text) in enumerate(zip(points, texts, strict=True)):
        others = [box for number, box in enumerate(taken) if number != index]
        (dx, dy), box, far = _free_place(centres[index], _size(ax, text), inside, others, scale)
        leader = {"arrowstyle": "-", "color": muted(), "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        made.append(
            ax.annotate(
                text, point, xytext=(dx / scale, dy / scale), textcoords="offset points", va="center", ha="center",
                fontsize=8, color=colors[index] if colors else None, annotation_clip=False,
                arrowprops=leader if far else None,
            )
        )  # fmt: skip
        taken.append(box)
    return made


def _size(ax: Axes, text: str) -> tuple[float, float]:
    """Pixels that a label takes up."""
    probe = ax.text(0.5, 0.5, text, fontsize=8, transform=ax.transAxes)
    extent = probe.get_window_extent()
    probe.remove()
    return extent.width, extent.height


def _free_place(
    centre: tuple[float, ...], size: tuple[float, float], inside: Box, taken: Sequence[Box], scale: float
) -> tuple[tuple[float, float], Box, bool]:
    """Where a label's middle goes, as seen from its point; what it takes up; and whether that is far from the point.

    Where nothing is free inside: below all else.
    """
    (x, y), (wide, high), pad = centre, size, PAD * scale

    def around(dx: float, dy: float) -> Box:
        return (x + dx - wide / 2 - pad, y + dy - high / 2 - pad, x + dx + wide / 2 + pad, y + dy + high / 2 + pad)

    for ring, (right, up) in product(RINGS, NEAR):
        dx = right * (ring * scale + wide / 2)
        dy = up * (ring * scale * (0.6 if right else 1) + high / 2)
        box = around(dx, dy)
        if _within(box, inside) and not any(_overlap(box, other) for other in taken):
            return (dx, dy), box, ring >= LEADER
    dy = min([inside[1], *(box[1] for box in taken)]) - high - y
    return (0.0, dy), around(0.0, dy), True


def at_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> list[Text]:
    """Write a text right of the axes at the height of each line's end: (y in data, text, colour); none on another.

    Instead of a legend: a reader need not match colours. A thin line leads to a text that had to move.
    """
    figure: Any = ax.get_figure(root=True)
    figure.draw_without_rendering()
    extent, bottom = ax.get_window_extent(), ax.get_ylim()
    wanted = [float(ax.transData.transform((ax.get_xlim()[1], _clip(y, bottom)))[1]) for y, _, _ in ends]
    height = 1.3 * 8 * figure.dpi / 72
    placed = spread(wanted, height, extent.y0, extent.y1)
    made: list[Text] = []
    for (_, text, color), at, want in zip(ends, placed, wanted, strict=True):
        up, from_up = ((y - extent.y0) / extent.height for y in (at, want))
        made.append(
            ax.text(1.045, up, text, transform=ax.transAxes, va="center", ha="left", fontsize=8, color=color,
                    clip_on=False)
        )  # fmt: skip
        ax.plot(
            [1.005, 1.038], [from_up, up], transform=ax.transAxes, color=color, linewidth=0.7, alpha=0.7, clip_on=False
        )
    return made


def spread(wanted: Sequence[float], height: float, low: float, high: float) -> list[float]:
    """Positions as near as may be to those wanted, in the same order, at least `height` apart, around [low, high]."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[tuple[float, int]] = []  # a group's middle, and how many stand in it
    for index in order:
        middle, size = wanted[index], 1
        while groups and groups[-1][0] + height * groups[-1][1] / 2 > middle - height * size / 2:
            other, others = groups.pop()
            middle, size = (other * others + middle * size) / (others + size), others + size
        groups.append((middle, size))
    placed: list[float] = []
    for middle, size in groups:
        placed += [middle + height * (number - (size - 1) / 2) for number in range(size)]
    if placed and placed[-1] > high:
        placed = [min(y, high - height * (len(placed) - 1 - number)) for number, y in enumerate(placed)]
    if placed and placed[0] < low and height * (len(placed) - 1) <= high - low:
        placed = [max(y, low + height * number) for number, y in enumerate(placed)]
    found = [0.0] * len(wanted)
    for index, y in zip(order, placed, strict=True):
        found[index] = y
    return found


def _clip(y: float, limits: tuple[float, float]) -> float:
    return min(max(y, min(limits)), max(limits))


def _box(extent: Any) -> Box:
    return extent.x0, extent.y0, extent.x1, extent.y1


def _within(box: Box, outer: Box) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
