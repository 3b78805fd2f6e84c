"""A trained model over bytes against full attention, layer by layer, as merges accumulate; and how tight the bound is.

    python tools/fidelity.py tiny-kvm-sqrt --tokens 1537 --every 256

Read is IDLE's help, which no shipped model was trained on. First the model under its own policy, then under one that
reads slots as means with log(count), rotary kept, for which the bound can be told.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

import torch

from memkit import load_policy
from memkit.evals import HeadFidelity, fidelity
from memkit.lm import ByteTokenizer, load_model
from memkit.texts import idle_help

MEANS = {
    "chunker.size": 32,
    "window.chunks": 2,
    "sinks": 1,
    "growth.factor": 4,
    "growth.floor": 32,
    "rotary": {"kind": "keep"},
    "readout": {"key": "mean", "value": "mean", "bias": "count"},
}


def main() -> None:
    """Print a line per layer and place: the mean over heads, and the range of errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1537)
    parser.add_argument("--every", type=int, default=256)
    given = parser.parse_args()
    text = idle_help()
    if text is None:
        parser.error("this Python came without IDLE's help")
    ids = torch.tensor([ByteTokenizer().encode(text)[: given.tokens]])
    for label, policy in (("as trained", None), ("means", load_policy("untrained-kvm-sqrt", MEANS))):
        heads: dict[tuple[int, int], list[HeadFidelity]] = defaultdict(list)
        for each in fidelity(load_model(given.model, policy=policy), ids, every=given.every):
            heads[each.layer, each.tokens].append(each)
        for (layer, tokens), found in sorted(heads.items()):
            errors = [each.error for each in found]
            sinks, slots, window = (
                statistics.mean(getattr(each, part) for each in found) for part in ("sinks", "slots", "window")
            )
            bounds = [each.bound for each in found if each.bound is not None]
            bound = f"  bound {statistics.mean(bounds):.1f}" if bounds else ""
            print(
                f"{label:10} layer {layer} after {tokens:5}: {found[0].merges:5} merged  "
                f"error {statistics.mean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})  "
                f"sinks {sinks:.3f} slots {slots:.3f} window {window:.3f}{bound}"
            )


if __name__ == "__main__":
    main()
