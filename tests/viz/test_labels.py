"""Labels lie on no other label and on no dot, however the points fall."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.text import Text

from memkit.viz import style
from memkit.viz.labels import at_ends, beside_points, spread

mpl.use("agg")


def boxes(texts):
    return [text.get_window_extent().frozen() for text in texts]


def overlapping(found):
    return [(a, b) for a, b in itertools.combinations(found, 2) if a.overlaps(b)]


CROWDS = {
    "all on one point": [(1.0, 1.0)] * 9,
    "two clumps": [(1.0, 1.0), (1.001, 1.0), (1.0, 1.001), (3.0, 2.0), (3.001, 2.0), (3.0, 2.0)],
    "a line": [(x, 1.0) for x in np.linspace(1, 1.2, 10)],
    "at random": np.random.default_rng(0).uniform(1, 1.4, (14, 2)).tolist(),
    "one": [(1.0, 1.0)],
}


@pytest.mark.parametrize("points", CROWDS.values(), ids=CROWDS.keys())
def test_labels_lie_on_no_label_and_no_dot(points: list[tuple[float, float]]):
    with style.theme():
        ax = style.new_axes()
        ax.scatter(*zip(*points, strict=True))
        ax.margins(0.2)
        notes = beside_points(ax, points, [f"policy-number-{i}" for i in range(len(points))])
        pyplot.gcf().draw_without_rendering()
        sizes = [Text.get_window_extent(note) for note in notes]  # without the line that leads there
        assert overlapping(sizes) == []
        dots = ax.transData.transform(points)
        assert [dot for dot in dots for size in sizes if size.contains(*dot)] == []


def test_labels_at_line_ends_keep_their_order_and_overlap_nowhere():
    with style.theme():
        ax = style.new_axes()
        heights = [1.0, 1.01, 1.02, 5.0, 1.015, 4.99]
        for y in heights:
            ax.plot([0, 1], [y, y])
        texts = at_ends(ax, [(y, f"line {y}", "C0") for y in heights])
        pyplot.gcf().draw_without_rendering()
        assert overlapping(boxes(texts)) == []
        order = sorted(range(len(heights)), key=lambda i: texts[i].get_position()[1])
        assert [heights[i] for i in order] == sorted(heights)


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_and_distance(seed: int):
    wanted = np.random.default_rng(seed).uniform(0, 100, 8).tolist()
    placed = spread(wanted, 10, 0, 100)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(np.array(placed)[order]) > 10 - 1e-9).all()
    assert min(placed) > -1e-9
    assert max(placed) < 100 + 1e-9


def test_spread_moves_nothing_that_has_room():
    assert spread([10, 50, 30], 10, 0, 100) == [10, 50, 30]
    assert spread([], 10, 0, 100) == []
