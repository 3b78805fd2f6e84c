"""A memory against full attention, layer by layer, as merges accumulate; and how tight the bound is.

    python tools/fidelity.py tiny-kvm-sqrt --tokens 1537 --every 256
    python tools/fidelity.py --policy untrained-observed --policy streaming-4-512 --tokens 4097 --every 1024

A trained model over bytes reads IDLE's help, which none of the shipped was trained on: first under its own policy, then
under one that reads slots as means with log(count), rotary kept, for which the bound can be told. With --policy a stock
model (SmolLM2-135M-Instruct, or --stock) reads the text of `memkit compare`, or --text, with full attention, and each
policy is put into its calls.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from memkit import hf, load_policy
from memkit.evals import HeadFidelity, fidelity
from memkit.lm import ByteTokenizer, load_model
from memkit.texts import default_text, idle_help, read_text

MEANS = {
    "chunker.size": 32,
    "window.chunks": 2,
    "sinks": 1,
    "growth.factor": 4,
    "growth.floor": 32,
    "rotary": {"kind": "keep"},
    "readout": {"key": "mean", "value": "mean", "bias": "count"},
}


def of_trained(name: str, tokens: int, every: int) -> Iterator[tuple[str, list[HeadFidelity]]]:
    """A trained model as it is, and as it is read by means."""
    text = idle_help()
    if text is None:
        raise SystemExit("this Python came without IDLE's help")
    ids = torch.tensor([ByteTokenizer().encode(text)[:tokens]])
    for label, policy in (("as trained", None), ("means", load_policy("untrained-kvm-sqrt", MEANS))):
        yield label, fidelity(load_model(name, policy=policy), ids, every=every)


def of_stock(
    policies: list[str], model: str | None, text: Path | None, tokens: int, every: int
) -> Iterator[tuple[str, list[HeadFidelity]]]:
    """A stock model under each policy."""
    loaded = hf.load(model)
    ids = loaded.tokenizer(default_text() if text is None else read_text(text), verbose=False)["input_ids"][:tokens]
    for policy in policies:
        yield policy, fidelity(loaded.model, torch.tensor([ids]), policy, every=every)


def lines(label: str, found: list[HeadFidelity]) -> Iterator[str]:
    """A line per layer and place: the mean over heads, and the range of errors."""
    heads: dict[tuple[int, int], list[HeadFidelity]] = defaultdict(list)
    for each in found:
        heads[each.tokens, each.layer].append(each)
    for (tokens, layer), some in sorted(heads.items()):
        errors = [each.error for each in some]
        sinks, slots, window, merges = (
            statistics.mean(getattr(each, part) for each in some) for part in ("sinks", "slots", "window", "merges")
        )
        bounds = [each.bound for each in some if each.bound is not None]
        bound = f"  bound {statistics.mean(bounds):.1f}" if bounds else ""
        yield (
            f"{label:10} layer {layer:2} after {tokens:5}: {merges:6.0f} merged  "
            f"error {statistics.mean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})  "
            f"sinks {sinks:.3f} slots {slots:.3f} window {window:.3f}{bound}"
        )


def main() -> None:
    """Print a line per policy, place and layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a trained model over bytes; left out where --policy is given")
    parser.add_argument("--policy", action="append", help="of a stock model; may be repeated")
    parser.add_argument("--stock", help="a stock model's folder or GGUF file")
    parser.add_argument("--text", type=Path, help="what a stock model reads")
    parser.add_argument("--tokens", type=int, default=1537)
    parser.add_argument("--every", type=int, default=256)
    given = parser.parse_args()
    if (given.model is None) == (given.policy is None):
        parser.error("give a trained model, or --policy for a stock one")
    of_policies = (
        of_trained(given.model, given.tokens, given.every)
        if given.policy is None
        else of_stock(given.policy, given.stock, given.text, given.tokens, given.every)
    )
    for label, found in of_policies:
        for line in lines(label, found):
            print(line, flush=True)


if __name__ == "__main__":
    main()
