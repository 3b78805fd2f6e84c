"""A head profile: which layers and heads get how many rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType

from memkit.profiles import HeadProfile
from memkit.viz.style import is_dark
from memkit.viz.tables import columns, with_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot", "table"]

BAR = 8
"""Characters for the largest ratio."""


def table(profile: HeadProfile, stability: float | None = None) -> RenderableType:
    """A line per layer, a number and a bar per key/value head."""
    layers, heads = profile.shape
    grid = columns("layer", *(f"head {head}" for head in range(heads)), align="r" + "l" * heads, gap=2)
    largest = max(max(row) for row in profile.ratios)
    for layer, row in enumerate(profile.ratios):
        grid.add_row(str(layer), *(f"{ratio:5.3f} {'█' * max(1, round(BAR * ratio / largest))}" for ratio in row))
    ratios = [ratio for row in profile.ratios for ratio in row]
    notes = [
        f"slots of each key/value head, as a multiple of the even share: {min(ratios):g} to {largest:g}, "
        f"mean {sum(ratios) / len(ratios):.3f}, {layers} layers × {heads} heads",
    ]
    if stability is not None:
        notes.append(f"correlation between one text's ratios and another's: {stability:.2f}")
    return with_notes(grid, notes)


def plot(profile: HeadProfile, ax: Axes) -> Axes:
    """A heat map of layers × heads: how many times the even share each gets."""
    layers, heads = profile.shape
    shown = ax.imshow(
        [list(row) for row in zip(*profile.ratios, strict=True)],
        aspect="auto",
        cmap="cividis" if is_dark() else "cividis_r",
    )
    ax.set_xlabel("layer")
    ax.set_ylabel("key/value head")
    ax.set_yticks(range(heads))
    ax.set_xticks(range(0, layers, max(1, layers // 10)))
    bar = ax.figure.colorbar(shown, ax=ax, pad=0.02, label="× even share")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return ax
