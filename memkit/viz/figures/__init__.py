"""Figures: each a function of data and matplotlib axes (left out: those of a new figure), which returns the axes.

from memkit.viz import figures, style

with style.theme(dark=True):
    ax = figures.growth(memkit.cost("kvm-sqrt-16", [1024, 4096, 16384]))
    style.save(ax.figure, "growth.png")
"""

from memkit.viz.figures.benches import factors
from memkit.viz.figures.budget import bytes_by_tokens, cost_curves, growth
from memkit.viz.figures.quality import accuracy, error_map, front, gap_closed, loss_by_position
from memkit.viz.figures.rows import age, occupancy, scores
from memkit.viz.figures.seen import tokens_in_slots, who_sees_what

__all__ = [
    "accuracy",
    "age",
    "bytes_by_tokens",
    "cost_curves",
    "error_map",
    "factors",
    "front",
    "gap_closed",
    "growth",
    "loss_by_position",
    "occupancy",
    "scores",
    "tokens_in_slots",
    "who_sees_what",
]
