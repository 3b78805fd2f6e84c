"""How memkit's figures look: colours that colour-blind readers tell apart, a mark with each, a light and a dark theme.

matplotlib is imported when something is drawn. Figures are drawn at the size at which they are shown: 6 inches are a
column of text, 12 its double, and letters are 8 or 9 points high in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from memkit.errors import InputError, ModelError, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ENDINGS",
    "NARROW",
    "WIDE",
    "Series",
    "check_ending",
    "check_installed",
    "grid",
    "is_dark",
    "muted",
    "new_axes",
    "panels",
    "save",
    "series",
    "theme",
    "write",
]

ENDINGS = (".png", ".svg", ".pdf")
"""What a figure's file may end in."""

NARROW, WIDE = 6.0, 12.0
"""Inches: a column, and two."""

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#9b4f8f", "#b07d00", "#3d3d3d", "#2a94d6")
DARK = ("#5cb3ea", "#ff8c42", "#3fcf9f", "#df9fce", "#f2c14e", "#d9d9d9", "#9cd4f5")
"""The colours of Okabe and Ito, darkened for white paper and lightened for a black one. Same order in both."""

MARKS = ("o", "s", "^", "D", "v", "P", "X", "<")
"""One more than there are colours, so that the two together repeat only after 56 series."""

_COMMON = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": False,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "memkit",
    "savefig.dpi": 150,
}
_PAPER = {False: ("#ffffff", "#1f1f1f", "#6b6b6b", "#dddddd"), True: ("#14161a", "#ececec", "#a3a8b0", "#343841")}
"""Of the light and the dark theme: the paper, the ink, lighter ink, lines of the grid."""


class Series(NamedTuple):
    """A colour and a mark, by which one line or one group of points is known."""

    color: str
    marker: str


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ModelError(
            "figures need matplotlib, which is not installed; run: pip install 'memkit-attention[notebook]'"
        ) from None
    return matplotlib


@contextlib.contextmanager
def theme(dark: bool = False) -> Generator[None]:
    """Inside the `with` block, figures are drawn in memkit's style: on white, or on black."""
    matplotlib = _matplotlib()
    paper, ink, lighter, lines = _PAPER[dark]
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    settings: dict[str, Any] = {
        **_COMMON,
        **dict.fromkeys(inks, ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), lighter),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        "grid.color": lines,
        "axes.prop_cycle": matplotlib.cycler(color=DARK if dark else LIGHT),
    }
    with matplotlib.rc_context(settings):
        yield


def new_axes(ax: Axes | None = None, size: tuple[float, float] = (NARROW, 3.6)) -> Axes:
    """The axes that were given, or those of a new figure of so many inches.

    Raises `ModelError` where matplotlib is not installed.
    """
    if ax is not None:
        return ax
    _matplotlib()
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def panels(count: int, height: float = 3.6) -> tuple[list[Axes], Figure]:
    """A new figure of so many axes side by side, each a column wide, and so many inches high; the axes, and it.

    Raises `ModelError` where matplotlib is not installed.
    """
    _matplotlib()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(NARROW * count, height), layout="constrained", squeeze=False)
    return list(axes[0]), figure


def series(index: int) -> Series:
    """The look of the series of a number, the first 0, under the theme of now."""
    return Series(_palette()[index % len(LIGHT)], MARKS[index % len(MARKS)])


def muted() -> str:
    """The colour of what stands back: other points, reference lines, small print."""
    return _paper()[2]


def grid(ax: Axes, axis: str = "both") -> None:
    """Thin lines behind the data."""
    ax.grid(visible=True, axis=axis, which="major", color=_paper()[3], linewidth=0.6)  # pyright: ignore[reportArgumentType]
    ax.set_axisbelow(True)


def is_dark() -> bool:
    """Whether the theme of now draws on a dark paper."""
    from matplotlib import colors, rcParams

    return sum(colors.to_rgb(rcParams["figure.facecolor"])) < 1.5


def _palette() -> tuple[str, ...]:
    return DARK if is_dark() else LIGHT


def _paper() -> tuple[str, str, str, str]:
    return _PAPER[is_dark()]


def check_ending(option: str, path: Path) -> None:
    """Raise `InputError` where a figure cannot be written to a file of that name."""
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{option} {short(str(path))}: must end in {', '.join(ENDINGS)}")


def check_installed() -> None:
    """Raise `ModelError` where matplotlib is not installed."""
    _matplotlib()


def save(figure: Figure, path: str | Path, width: int | None = None) -> None:
    """Write a figure to a file of the kind that its ending says, and close it.

    width: pixels of a PNG; left out: 150 per inch.

    Raises `InputError` for another ending, or where the file cannot be written.
    """
    path = Path(path)
    check_ending("figure", path)
    try:
        write(figure, path, path.suffix.lower()[1:], width)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a file in a folder of yours") from None


def write(figure: Figure, to: Path | IO[bytes], kind: str, width: int | None = None) -> None:
    """Write a figure as "png", "svg" or "pdf", and close it: the same figure, the same bytes."""
    from matplotlib import pyplot

    dpi = 150 if width is None else width / figure.get_figwidth()
    plain = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        figure.savefig(to, format=kind, dpi=dpi, metadata=plain.get(kind))
    finally:
        pyplot.close(figure)
