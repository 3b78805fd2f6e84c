"""Where averaging loses the needle: a number hidden in real text, by pooled block size and by the number of slots.

    python tools/needle.py --tokens 1024 --placements 8

The stock model reads the text under blocks of 1, 2, 4 … tokens pooled into one slot each, and under merged slots, 64 to
512 of them, with keys and values averaged or values alone. Blocks of 1 average nothing: what they lose, the rotation of
slots loses. `--model` takes another model, `--text` another text, as for `memkit compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import memkit
from memkit import texts
from memkit.passkey import find_passkeys
from memkit.policy import PolicySpec

BLOCKS = (1, 2, 4, 8, 16)
SLOTS = (64, 128, 256, 512)
BY_VALUES = {"readout.key": "mean", "readout.value": "mean", "merging.of": "values"}
"""Founders keep their keys and positions, and only values are averaged."""


def policies() -> Iterator[PolicySpec]:
    """Each policy, named after what is varied."""
    for block in BLOCKS:
        yield memkit.load_policy("block-mean-8", {"growth.fraction": 1 / block}).named(f"blocks of {block}")
    for label, changes in (("", {}), (", values alone", BY_VALUES)):
        for slots in SLOTS:
            policy = memkit.load_policy("untrained-kvm-fixed", {"growth.slots": slots, **changes})
            yield policy.named(f"{slots} slots{label}")


def main() -> None:
    """Print a line per policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--placements", type=int, default=8)
    given = parser.parse_args()
    found = find_passkeys(
        [*policies(), "full"],
        model=given.model,
        text=None if given.text is None else texts.read_text(given.text),
        tokens=given.tokens,
        placements=given.placements,
        progress=lambda policy, done, every: print(f"\r{policy}: {done} of {every}   ", end="", flush=True),
    )
    print()
    for one in found.policies:
        loss = f"{one.nats:.2f} ± {one.nats_error:.2f}"
        print(f"{one.policy:24} {one.found}/{one.placements}  {loss:12} nats  {one.bytes / 1e6:6.1f} MB")


if __name__ == "__main__":
    main()
