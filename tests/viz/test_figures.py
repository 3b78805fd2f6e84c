"""Figures draw what they are given, into the axes they are given, with units, in both themes."""

from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import colors, pyplot
from typer.testing import CliRunner

import memkit
from memkit.benchmark import Bench, Timing
from memkit.cli import app
from memkit.comparison import Comparison, Measurement
from memkit.errors import InputError, ModelError
from memkit.viz import figures, style
from memkit.viz.figures.benches import KINDS
from memkit.viz.picture import picture
from memkit.viz.trace import Trace, trace

mpl.use("agg")

LENGTHS = [1024, 4096, 16384]


def measured(policy: str, megabytes: float, loss: float, front: bool, closed: float | None) -> Measurement:
    entry = Measurement(policy, loss, None, None, 1, 1, None, int(megabytes * 1e6), None, 1.0, 1.0, front=front)
    error = None if closed is None else 0.1
    return replace(entry, gap_closed=closed, gap_error=error, second_gap_closed=closed, second_gap_error=error)


def comparison() -> Comparison:
    settings = {"model": "tiny", "tokens": 4096, "skip": 1024}
    return Comparison(
        settings,
        (
            measured("streaming-4-512", 26.5, 2.451, True, 0.0),
            measured("full", 188.7, 2.329, True, 1.0),
            measured("h2o-512", 31.8, 2.493, False, -0.35),
            measured("caote-512", 31.8, 2.489, False, -0.32),
            measured("block-mean-8", 37.6, 3.284, False, -6.85),
        ),
    )


def bench() -> Bench:
    rows = [
        Timing(policy, mode, tokens, 0.1, 0.1, 0.1, 0.1 * tokens / 2048, 0.05)
        for policy in memkit.policy_names()
        for mode in ("forward", "decode")
        for tokens in LENGTHS
    ]
    return Bench({}, rows)


def traced() -> Trace:
    torch.manual_seed(0)
    policy = memkit.load_policy("h2o-512", {"chunker.size": 8, "growth.slots": 12, "observe.queries": 8})
    return trace(policy, torch.randn(2, 90, 16), torch.randn(90, 16), torch.randn(90, 12))


def costs() -> list[memkit.Cost]:
    return [entry for name in ("full", "kvm-sqrt-16") for entry in memkit.cost(name, LENGTHS)]


def seen():
    drawn = picture(memkit.load_policy("kvm-sqrt-16").build())
    assert drawn is not None
    return drawn


def numbers(data: object) -> list[float]:
    return np.asarray(data).tolist()


LOSSES = {"full": np.linspace(2, 3, 64).tolist(), "window-512": np.linspace(3, 4, 64).tolist()}

DRAWN = {
    "growth": lambda ax=None: figures.growth(costs(), ax),
    "cost": lambda ax=None: figures.cost_curves(costs(), ax),
    "bytes": lambda ax=None: figures.bytes_by_tokens([1, 10], {"a": [1, 2], "b": [3, 4]}, ax),
    "mask": lambda ax=None: figures.who_sees_what(seen(), ax),
    "occupancy": lambda ax=None: figures.occupancy(traced(), ax),
    "age": lambda ax=None: figures.age(traced(), ax),
    "scores": lambda ax=None: figures.scores(traced(), ax),
    "front": lambda ax=None: figures.front(comparison(), ax),
    "gap": lambda ax=None: figures.gap_closed(comparison(), ax),
    "loss": lambda ax=None: figures.loss_by_position(LOSSES, ax, start=100),
    "errors": lambda ax=None: figures.error_map(np.ones((6, 3)), ax),
    "accuracy": lambda ax=None: figures.accuracy([("full", 10**7, 1.0), ("none", 10**6, 0.0)], ax, chance=0.1),
}


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_drawn_where_it_is_told_with_words_at_its_axes(name: str):
    with style.theme():
        own = style.new_axes()
        assert DRAWN[name](own) is own
        assert own.get_xlabel()
        assert own.get_ylabel() or own.get_yticklabels()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["growth", "mask", "occupancy", "front"])
def test_themes_have_their_own_paper_and_inks(name: str, dark: bool):
    with style.theme(dark):
        ax = DRAWN[name]()
        paper = np.array(colors.to_rgb(ax.figure.get_facecolor()))
        inks = {colors.to_rgb(text.get_color()) for text in ax.texts + ax.get_xticklabels()}
    assert (paper.sum() < 1.5) == dark
    assert all(np.abs(np.array(ink) - paper).sum() > 0.6 for ink in inks)


def test_growth_draws_the_costs():
    ax = figures.growth(costs(), what="slots")
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    assert numbers(lines["kvm-sqrt-16"].get_xdata()) == LENGTHS
    assert numbers(lines["kvm-sqrt-16"].get_ydata()) == [memkit.cost("kvm-sqrt-16", n).slots for n in LENGTHS]
    assert {text.get_text() for text in ax.texts} == {"full", "kvm-sqrt-16"}
    assert figures.growth(costs(), scale="linear").get_xscale() == "linear"


def test_costs_have_their_exponents_written_at_their_lines():
    ax = figures.cost_curves(costs())
    assert [text.get_text() for text in ax.texts] == [
        f"$N^{{{memkit.cost(name, 1024).exponent:.2f}}}$  {name}" for name in ("full", "kvm-sqrt-16")
    ]
    assert {text.get_text() for text in figures.cost_curves(costs(), of="token").texts} == {"full", "kvm-sqrt-16"}


def test_series_differ_in_colour_and_mark():
    looks = [style.series(number) for number in range(20)]
    assert len(set(looks)) == 20
    assert len({look.color for look in looks[:7]}) == len({look.marker for look in looks[:7]}) == 7


def test_the_mask_has_a_mark_for_every_cell():
    ax = figures.who_sees_what(seen())
    shown = sum(len(group.get_offsets()) for group in ax.collections)
    assert shown == sum(len(cells.rstrip(" ")) for cells in seen().cells)


def test_the_front_is_a_line_and_every_policy_is_named():
    ax = figures.front(comparison())
    assert {text.get_text() for text in ax.texts} == {entry.policy for entry in comparison().policies}
    assert numbers(ax.get_lines()[0].get_xdata()) == [26.5, 188.7]


def test_the_gap_needs_both_its_ends():
    with pytest.raises(InputError, match="needs streaming-4-512 and full"):
        figures.gap_closed(replace(comparison(), policies=(measured("full", 1, 1, True, None),)))
    assert "◂ -685 %" in {text.get_text() for text in figures.gap_closed(comparison()).texts}


def test_loss_by_position_draws_means():
    ax = figures.loss_by_position(LOSSES, start=100, parts=4)
    line = ax.get_lines()[0]
    assert numbers(line.get_xdata()) == [108, 124, 140, 156]
    assert line.get_ydata() == pytest.approx(np.array(LOSSES["full"]).reshape(4, 16).mean(1))
    with pytest.raises(InputError, match="the same positions for all policies"):
        figures.loss_by_position({"a": [1.0] * 64, "b": [1.0] * 63})


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: figures.error_map(np.ones(3)), r"errors must be numbers \[layers, heads\]"),
        (lambda: figures.accuracy([]), "points must be one"),
        (lambda: figures.accuracy([("full", 1, 1.0)], spreads=[0.1, 0.1]), "spreads must be as many"),
        (lambda: figures.tokens_in_slots(traced(), ["word"] * 3), "words must be the text of 90 tokens"),
    ],
)
def test_bad_data_is_one_line(draw, message: str):
    with pytest.raises(InputError, match=message):
        draw()


def test_a_text_is_printed_token_by_token():
    found = traced()
    words = [f" w{number}" if number != 7 else "$\n" for number in range(90)]
    ax = figures.tokens_in_slots(found, words)
    pyplot.gcf().draw_without_rendering()
    printed = [text.get_text() for text in ax.texts]
    assert [word for word in words if word.replace("\n", "↵") not in printed] == []
    inside = [str(slot) if slot >= 4 else f"s{slot}" for slot in found.slots[-1] if slot >= 0]
    assert sorted(text for text in printed if text.lstrip("s").isdigit()) == sorted(inside)
    assert len(ax.get_lines()) == found.forgotten()


def test_nothing_to_score_is_said():
    assert figures.scores(replace(traced(), decisions=())).texts[0].get_text() == "nobody is scored"


def test_timings_are_small_multiples_of_few_lines():
    first = figures.factors(bench())
    panels = [ax for ax in first.figure.axes if ax.get_lines()]
    names = {text.get_text() for panel in panels for text in panel.texts}
    assert names >= set(memkit.policy_names()) | {"prefill", "one decoded token"}
    for panel in panels:
        dotted = [line for line in panel.get_lines() if line.get_linestyle() == ":"]
        assert 0 < len(dotted) <= 7, "each line's limit, and few lines"
    titles = [panel.get_title("left") for panel in panels if panel.get_title("left")]
    assert len(titles) == len(set(titles)) >= 4
    assert {ax.get_title("left") for ax in panels} - {""} <= {kind for kind, _ in KINDS}


def test_a_figure_is_the_same_bytes_twice_and_says_what_files_it_knows(tmp_path: Path):
    for number in range(2):
        with style.theme():
            style.save(DRAWN["front"]().figure, tmp_path / f"{number}.svg")
    assert (tmp_path / "0.svg").read_bytes() == (tmp_path / "1.svg").read_bytes()
    with style.theme():
        style.save(DRAWN["growth"]().figure, tmp_path / "wide.png", width=600)
    assert pyplot.imread(tmp_path / "wide.png").shape[1] == 600
    with pytest.raises(InputError, match=r"figure x\.gif: must end in \.png, \.svg, \.pdf"):
        style.save(style.new_axes().figure, "x.gif")
    with pytest.raises(InputError, match="cannot be written"):
        style.save(style.new_axes().figure, tmp_path / "no" / "where.png")


@pytest.mark.parametrize(
    "arguments",
    [["show", "kvm-sqrt-16"], ["show", "untrained-observed", "--dark"], ["show", "tiny-kvm-rwkv7"], ["cost", "full"]],
)
def test_commands_draw(arguments: list[str], tmp_path: Path):
    out = tmp_path / "out.png"
    done = CliRunner().invoke(app, [*arguments, "--plot", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


def test_commands_refuse_other_files_before_they_work(monkeypatch: pytest.MonkeyPatch):
    for command in (["show", "full"], ["cost", "full"], ["compare"]):
        done = CliRunner().invoke(app, [*command, "--plot", "x.gif"])
        assert (done.exit_code, done.stderr) == (2, "--plot x.gif: must end in .png, .svg, .pdf\n")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModelError, match=r"pip install 'memkit-attention\[notebook\]'"):
        style.check_installed()
