"""A prompt read in full and compressed at once, at several places of each text: how much of the gap is closed.

    python tools/compressed.py hamlet_gut.txt macbeth_gut.txt --rows 256

Of each stretch 2,048 tokens are read exactly, then compressed, and 255 of the next 256 are predicted from what is left.
Closed: (streaming − policy) / (streaming − full attention), of all stretches of a text together; the standard error is
over texts. What `memkit compare --prefill full` does at a text's beginning.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import memkit
from memkit import hf
from memkit.hf.names import CACHE, returned_cache
from memkit.texts import read_text

PROMPT, SCORED = 2048, 256


def loss(logits: Tensor, ids: Tensor) -> float:
    """The mean loss of tokens [1, n] by logits [1, n, vocabulary]."""
    return float(cross_entropy(logits[0].float(), ids[0]))


def compressed(loaded: hf.LoadedModel, policy: memkit.PolicySpec, ids: Tensor, rows: int) -> float:
    """The loss of what follows the prompt, read from what the policy keeps of it."""
    model: Any = loaded.model
    words = hf.connecting_ids(loaded.tokenizer) if policy.observe.readers in ("repeat", "mixed") else None
    with hf.attach(model, policy, prefill="full", rows=rows, connecting=words):
        cache = returned_cache(model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1))
        return loss(model(ids[:, PROMPT:], **{CACHE: cache}).logits[:, :-1], ids[:, PROMPT + 1 :])


@torch.no_grad()
def main() -> None:
    """Print a line per stretch, one per text, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--policy", default="untrained-observed")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--stretches", type=int, default=3, help="of each text, evenly spaced")
    given = parser.parse_args()
    loaded = hf.load()
    model: Any = loaded.model
    policies = [memkit.load_policy(name) for name in ("streaming-4-512", given.policy)]
    closed = list[float]()
    for path in given.texts:
        ids = torch.tensor([loaded.tokenizer(read_text(path))["input_ids"]])
        last, gaps, saved = ids.shape[1] - PROMPT - SCORED, 0.0, 0.0
        if last < 0:
            parser.error(f"{path} must have {PROMPT + SCORED} tokens, got {ids.shape[1]}")
        for number in range(given.stretches):
            begin = last * number // max(1, given.stretches - 1)
            stretch = ids[:, begin : begin + PROMPT + SCORED]
            full = loss(model(stretch).logits[:, PROMPT:-1], stretch[:, PROMPT + 1 :])
            streaming, own = (compressed(loaded, policy, stretch, given.rows) for policy in policies)
            gaps, saved = gaps + streaming - full, saved + streaming - own
            share = (streaming - own) / (streaming - full)
            print(
                f"{path.name:32} from token {begin:6}: full {full:.3f}, streaming {streaming:.3f}, closed {share:.0%}"
            )
        closed.append(saved / gaps)
        print(f"{path.name:32} {closed[-1]:.0%}", flush=True)
    error = statistics.stdev(closed) / len(closed) ** 0.5 if len(closed) > 1 else float("nan")
    print(f"{given.policy}, {given.rows} rows: {statistics.mean(closed):.1%} ± {error:.1%} over {len(closed)} texts")


if __name__ == "__main__":
    main()
