"""What a policy will take, before anything runs: slots, bytes and operations against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from memkit.costing import Cost
from memkit.viz.labels import at_ends
from memkit.viz.style import grid, new_axes, series
from memkit.viz.tables import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bytes_by_tokens", "cost_curves", "growth"]


def growth(
    costs: Sequence[Cost],
    ax: Axes | None = None,
    *,
    what: Literal["slots", "rows", "bytes"] = "bytes",
    scale: Literal["log", "linear"] = "log",
) -> Axes:
    """How much policies hold after so many tokens: a line per policy, with its name at its end.

    costs: what `memkit.cost` gave, for one policy or several, at several lengths, all for one shape.
    what: slots of each head; rows (slots and window) of each head; or bytes of all heads and layers.
    scale: of both axes.
    """
    ax = new_axes(ax)
    words = {"slots": "slots, each head", "rows": "slots and window, each head", "bytes": "memory, bytes"}
    measure = {
        "slots": lambda cost: cost.slots,
        "rows": lambda cost: cost.slots + cost.window,
        "bytes": lambda cost: cost.bytes,
    }[what]
    lines = _by_policy(costs)
    for number, (name, line) in enumerate(lines):
        _line(ax, number, name, [cost.tokens for cost in line], [measure(cost) for cost in line])
    _axes(ax, words[what], scale, bytes_are=what == "bytes")
    if scale == "linear":
        ax.set_xlim(0)
        ax.set_ylim(0)
    at_ends(ax, [(measure(line[-1]), name, series(number).color) for number, (name, line) in enumerate(lines)])
    return ax


def bytes_by_tokens(tokens: Sequence[int], lines: Mapping[str, Sequence[int]], ax: Axes | None = None) -> Axes:
    """Bytes against tokens read, on logarithmic axes, of whatever has a name: the layers of a model, for instance.

    lines: bytes at each of the `tokens`, by name.
    """
    ax = new_axes(ax)
    for number, (name, each) in enumerate(lines.items()):
        _line(ax, number, name, tokens, each)
    _axes(ax, "memory, bytes", "log", bytes_are=True)
    at_ends(ax, [(each[-1], name, series(number).color) for number, (name, each) in enumerate(lines.items())])
    return ax


def cost_curves(costs: Sequence[Cost], ax: Axes | None = None, *, of: Literal["prefill", "token"] = "prefill") -> Axes:
    """What reading costs: floating-point operations of a prefill, each line with the power of N that it grows with.

    costs: as for `growth`. of: the whole prefill, or one more token decoded after it (which has no power written).
    """
    ax = new_axes(ax)
    lines = _by_policy(costs)
    ends: list[tuple[float, str, str]] = []
    for number, (name, of_policy) in enumerate(lines):
        each = [float((cost.prefill if of == "prefill" else cost.decode).total) for cost in of_policy]
        _line(ax, number, name, [cost.tokens for cost in of_policy], each)
        power = f"$N^{{{of_policy[-1].exponent:.2f}}}$ " if of == "prefill" else ""
        ends.append((each[-1], f"{power} {name}".strip(), series(number).color))
    _axes(ax, "FLOPs of the prefill" if of == "prefill" else "FLOPs of one more token", "log")
    at_ends(ax, ends)
    return ax


def _by_policy(costs: Sequence[Cost]) -> list[tuple[str, list[Cost]]]:
    """Each policy's costs, the shortest text first; policies in the order given."""
    found: dict[str, list[Cost]] = {}
    for cost in costs:
        found.setdefault(cost.policy, []).append(cost)
    return [(name, sorted(each, key=lambda cost: cost.tokens)) for name, each in found.items()]


def _line(ax: Axes, number: int, name: str, tokens: Sequence[int], each: Sequence[float]) -> None:
    look, every = series(number), max(1, len(each) // 6)
    ax.plot(
        tokens, each, color=look.color, marker=look.marker, markevery=(number * every // 3 % every, every), label=name
    )  # fmt: skip


def _axes(ax: Axes, what: str, scale: Literal["log", "linear"], bytes_are: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.set(xlabel="tokens read", ylabel=what, xscale=scale, yscale=scale)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: _short(number)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: _short(number, "B" if bytes_are else "")))
    ax.minorticks_off()
    grid(ax)


def _short(number: float, unit: str = "") -> str:
    """At a tick: 10 MB, 4 k."""
    digits, _, prefix = amount(number, unit).partition(" ")
    return f"{float(digits):g} {prefix}".strip()
