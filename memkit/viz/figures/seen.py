"""Who sees what: the mask of a short sequence, and which slot each token of a real text went to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memkit.errors import InputError
from memkit.viz.picture import DROPPED, EXACT, FOUNDED, JOINED, MEANING, SINK, UNSEEN, Picture
from memkit.viz.style import NARROW, is_dark, muted, new_axes, series
from memkit.viz.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

__all__ = ["tokens_in_slots", "who_sees_what"]

_LOOK = {EXACT: (0, "s", True), SINK: (4, "D", True), FOUNDED: (2, "o", True), JOINED: (2, "o", False)}
"""Of each kind of token: its colour's number, its mark, and whether the mark is filled."""


def who_sees_what(drawn: Picture, ax: Axes | None = None) -> Axes:
    """What each query (downwards) sees of each token (to the right): exactly, in a slot, or no more.

    drawn: of `memkit.viz.picture.picture(policy)`, which scales a policy down to 60 tokens.
    """
    ax = new_axes(ax, (NARROW, 2.5))
    used = [mark for mark in MEANING if any(mark in cells for cells in drawn.cells)]
    for mark in used:
        where = [
            (token, row) for row, cells in enumerate(drawn.cells) for token, cell in enumerate(cells) if cell == mark
        ]
        columns, rows = zip(*where, strict=True)
        if mark == DROPPED:
            ax.scatter(columns, rows, s=3, color=muted(), marker=".", linewidths=0.5, label=MEANING[mark])
            continue
        number, marker, filled = _LOOK[mark]
        color = series(number).color
        ax.scatter(
            columns, rows, s=11, marker=marker, facecolors=color if filled else "none", edgecolors=color,
            linewidths=0.8, label=MEANING[mark],
        )  # fmt: skip
    ax.set_yticks(range(0, len(drawn.queries), 2), [str(query) for query in drawn.queries[::2]])
    ax.set(ylim=(len(drawn.queries) - 0.3, -0.7), xlim=(-1, len(drawn.cells[0])), xlabel="token", ylabel="query")
    ax.legend(loc="upper right", ncols=2, handletextpad=0.2, columnspacing=0.8, borderpad=0, labelspacing=0.25)
    if drawn.scale != 1:
        ax.set_title(f"scaled down {drawn.scale:.3g} times", fontsize=8, color=muted(), loc="right")
    assert UNSEEN not in used
    return ax


def tokens_in_slots(
    traced: Trace, words: Sequence[str], ax: Axes | None = None, *, look: int = -1, columns: int = 76
) -> Axes:
    """A text, each token on the colour of the slot that it is in, with the slot's number below; forgotten ones struck.

    words: the text of each token; of so many as were traced at least. look: after which of the trace's steps.
    columns: letters in a line of 6 inches.
    """
    tokens = traced.tokens_read[look]
    if len(words) < tokens:
        raise InputError(f"words must be the text of {tokens} tokens at least, got {len(words)}")
    plain = [_plain(word) for word in words[:tokens]]
    names = [_slot_name(traced, look, token) for token in range(tokens)]
    places = _places([max(len(word), -(-2 * len(name) // 3)) for word, name in zip(plain, names, strict=True)], columns)
    lines = places[-1][0] + 1
    ax = new_axes(ax, (NARROW, 0.34 + 0.25 * lines))
    ax.set(xlim=(0, columns), ylim=(lines, 0))
    ax.set_axis_off()
    first, dark = traced.first_tokens(look), is_dark()
    for token, (word, name, (line, column, wide)) in enumerate(zip(plain, names, places, strict=True)):
        slot, middle = int(traced.slots[look, token]), column + wide / 2
        exact, inside = token >= traced.window_begin[look], bool(name)
        edge, face = muted() if exact else "none", _tint(slot, dark) if inside else "none"
        ax.add_patch(_rectangle(column, line + 0.04, wide, 0.6, face, edge))
        ax.text(
            middle, line + 0.34, word, ha="center", va="center", family="monospace", fontsize=_size(columns),
            color=None if exact or inside else muted(), fontweight="bold" if first.get(slot) == token else "normal",
            parse_math=False,
        )  # fmt: skip
        if inside:
            ax.text(middle, line + 0.81, name, ha="center", va="center", fontsize=5.5, color=muted())
        elif not exact:
            ax.plot([column, column + wide], [line + 0.34] * 2, color=muted(), linewidth=0.7)
    ax.set_title("below: its slot (s: sink); bold: a slot's first token; framed: still exact; struck: forgotten",
                 fontsize=8, color=muted(), loc="left")  # fmt: skip
    return ax


def _slot_name(traced: Trace, look: int, token: int) -> str:
    """What a token's slot is called; nothing where it is in none."""
    slot = int(traced.slots[look, token])
    if slot < 0 or token >= traced.window_begin[look]:
        return ""
    return f"s{slot}" if slot < traced.sinks else str(slot)


def _plain(word: str) -> str:
    """A token as it can be printed on one line."""
    return word.replace("\n", "↵").replace("\t", "→").replace("\r", "") or "∅"


def _places(widths: Sequence[int], columns: int) -> list[tuple[int, int, int]]:
    """Line, column and width of each word of a text that is broken at so many columns."""
    places: list[tuple[int, int, int]] = []
    line = column = 0
    for wide in widths:
        if column + wide > columns and column:
            line, column = line + 1, 0
        places.append((line, column, wide))
        column += wide
    return places


def _size(columns: int) -> float:
    """Points at which so many letters of a fixed width fill a column of text."""
    return 0.97 * 72 * (NARROW - 0.1) / (0.602 * columns)


def _tint(slot: int, dark: bool) -> tuple[float, float, float]:
    """A colour of a slot's own, as far as may be from those of its neighbours, that letters can be read on."""
    from colorsys import hls_to_rgb

    hue = (slot * 0.61803398875) % 1
    level = (0.26, 0.33)[slot // 5 % 2] if dark else (0.86, 0.78)[slot // 5 % 2]
    return hls_to_rgb(hue, level, 0.55)


def _rectangle(x: float, y: float, wide: float, high: float, face: object, edge: str) -> Rectangle:
    from matplotlib import patches

    return patches.Rectangle((x + 0.05, y), wide - 0.1, high, facecolor=face, edgecolor=edge, linewidth=0.5)
