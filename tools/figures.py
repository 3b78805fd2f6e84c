"""The pictures of docs/stock-models.md: `python tools/figures.py [comparison.json]`.

The head profile of SmolLM2-135M as a heat map; and, from what `memkit compare --json` wrote, loss against memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot

from memkit.comparison import Comparison, Measurement
from memkit.profiles import load_profile
from memkit.viz import comparison, profiles

FOLDER = Path(__file__).parents[1] / "docs" / "figures"


def main(given: list[str]) -> None:
    """Draw what can be drawn."""
    figure, ax = pyplot.subplots(figsize=(8, 1.8), layout="constrained")
    profiles.plot(load_profile("smollm2-135m"), ax)
    figure.savefig(FOLDER / "profile.png", dpi=120)
    for path in given:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        read = Comparison(data["settings"], tuple(Measurement(**row) for row in data["policies"]))
        figure, ax = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        comparison.plot(read, ax)
        figure.savefig(FOLDER / "stock-models.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
