"""The pictures of the documentation, into docs/figures: `python tools/figures.py [--without-model]` (make figures).

Each is drawn twice, for white pages and for black ones. Numbers that were measured come from docs/figures/data; those
that SmolLM2-135M-Instruct is needed for take half a minute, the others some seconds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import memkit
from memkit.benchmark import Bench, Timing
from memkit.comparison import Comparison
from memkit.profiles import load_profile
from memkit.viz import figures, profiles, style
from memkit.viz.costs import DRAWN_LENGTHS
from memkit.viz.picture import picture

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
SIDE_BY_SIDE = ("full", "block-mean-8", "kvm-sqrt-16", "kvm-log-256", "kvm-fixed-256", "streaming-4-512")
GROWTHS = ("block-mean-8", "kvm-power-075", "kvm-sqrt-16", "kvm-log-256", "kvm-saturating-1024", "kvm-fixed-256")
MASKS = ("full", "streaming-4-512", "block-mean-8", "kvm-sqrt-16")
SMALL = {"chunker.size": 16, "growth.slots": 48, "window.chunks": 2}
"""A memory so small that its slots can be told apart in a picture of 512 tokens."""
LAYER, HEAD, TOKENS, LOOK = 12, 1, 512, 14


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without-model", action="store_true", help="only those that need no model")
    given = parser.parse_args()
    for name, drawn in (_of_policies() | _of_data() | ({} if given.without_model else _of_a_model())).items():
        for dark in (False, True):
            with style.theme(dark):
                style.save(drawn().figure, FOLDER / f"{name}{'-dark' if dark else ''}.png")
        print(name, flush=True)


def _of_policies() -> dict[str, Callable[[], Any]]:
    costs = [entry for name in SIDE_BY_SIDE for entry in memkit.cost(name, DRAWN_LENGTHS)]
    growths = [entry for name in GROWTHS for entry in memkit.cost(name, DRAWN_LENGTHS)]
    found: dict[str, Callable[[], Any]] = {
        "house": house,
        "memory": lambda: figures.growth(costs),
        "cost": lambda: figures.cost_curves(costs),
        "growth": lambda: figures.growth(growths, what="slots"),
    }
    for name in MASKS:
        drawn = picture(memkit.load_policy(name).build())
        assert drawn is not None
        found[f"mask-{name}"] = lambda drawn=drawn: figures.who_sees_what(drawn)
    return found


def _of_data() -> dict[str, Callable[[], Any]]:
    comparison, evictions = (
        Comparison.from_json((FOLDER / "data" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("comparison", "evictions")
    )
    data = json.loads((FOLDER / "data" / "bench.json").read_text(encoding="utf-8"))
    timings = [
        Timing(
            row["policy"], row["mode"], row["tokens"], seconds=1.0, low=1.0, high=1.0, full_seconds=row["factor"],
            limit_seconds=row.get("limit_share") or math.nan,
        )
        for row in data["timings"]
    ]  # fmt: skip
    positions = json.loads((FOLDER / "data" / "positions.json").read_text(encoding="utf-8"))["losses"]
    recall = json.loads((FOLDER / "data" / "recall.json").read_text(encoding="utf-8"))
    points = [(row["policy"], row["bytes"], row["accuracy"]) for row in recall["points"]]
    spreads = [row["spread"] for row in recall["points"]]
    return {
        "recall": lambda: figures.accuracy(
            points, style.new_axes(size=(6.0, 3.8)), what=f"accuracy at {recall['setting']}, %", spreads=spreads
        ),
        "positions": lambda: figures.loss_by_position(positions, style.new_axes(size=(6.0, 3.4)), start=1),
        "front": lambda: figures.front(comparison),
        "gap": lambda: figures.gap_closed(comparison),
        "evictions": lambda: figures.front(evictions),
        "bench": lambda: figures.factors(Bench(data["settings"], timings)),
        "profile": lambda: profiles.plot(load_profile("smollm2-135m-repeat"), style.new_axes(size=(6.0, 1.7))),
    }


def _of_a_model() -> dict[str, Callable[[], Any]]:
    from memkit import hf
    from memkit.texts import default_text
    from memkit.viz.layers import layer_inputs, output_errors, trace_head

    loaded = hf.load()
    ids = loaded.tokenizer(default_text()[:6000], verbose=False)["input_ids"][:TOKENS]
    words = [loaded.tokenizer.decode([token]) for token in ids]
    found: dict[str, Callable[[], Any]] = {}
    for name in ("untrained-kvm-fixed", "untrained-observed"):
        layers = layer_inputs(loaded, memkit.load_policy(name, SMALL), ids)
        traced, errors = trace_head(layers[LAYER], HEAD), output_errors(layers)
        found |= {
            f"tokens-{name}": lambda traced=traced: figures.tokens_in_slots(traced, words, look=LOOK),
            f"occupancy-{name}": lambda traced=traced: figures.occupancy(traced),
            f"age-{name}": lambda traced=traced: figures.age(traced),
            f"errors-{name}": lambda errors=errors: figures.error_map(errors),
        }
        if traced.decisions:
            found[f"scores-{name}"] = lambda traced=traced: figures.scores(traced)
    return found


def house() -> Any:
    """tokens → plan → fold → read, and what each stage looks at."""
    ax = style.new_axes(size=(style.NARROW, 1.9))
    ax.set(xlim=(0, 100), ylim=(0, 32))
    ax.set_axis_off()
    stages = (
        ("tokens", "queries, keys,\nvalues"),
        ("PLAN", "which slot does each\nleaving token go to?"),
        ("FOLD", "slots sum what\nthey are given"),
        ("READ", "window and slots,\none softmax"),
    )
    for number, (name, says) in enumerate(stages):
        x, look = 1 + 25.5 * number, style.series(number)
        if number < len(stages) - 1:
            ax.annotate("", (x + 25.2, 21), (x + 22.2, 21), arrowprops={"arrowstyle": "->", "color": style.muted()})
        ax.add_patch(mpl.patches.Rectangle((x, 11), 22, 20, fill=False, edgecolor=look.color, linewidth=1.4))
        ax.text(x + 11, 26, name, ha="center", va="center", color=look.color, fontweight="bold")
        ax.text(x + 11, 17.5, says, ha="center", va="center", fontsize=7.5)
    below = ("kept exactly in the window", "whole numbers,\nno gradient", "linear, given the plan", "the output")
    for number, words in enumerate(below):
        ax.text(12 + 25.5 * number, 5, words, ha="center", va="center", fontsize=7.5, color=style.muted())
    return ax


if __name__ == "__main__":
    main()
