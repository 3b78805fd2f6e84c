"""What still separates a policy from full attention on a stock model: which kind of token, and which layers.

    python tools/gap.py untrained-observed --text hamlet_gut_f.txt

Tokens are told apart by how far back the same token stood behind the same one: what can be copied from there, a memory
loses first. Layers are told apart by giving a few of them full attention, and by giving those alone the policy.
Losses are in nats per token, differences paired, ± their standard error over tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from memkit import hf
from memkit.evals import loss_by_position
from memkit.layers import LayerPoliciesSpec, as_layers
from memkit.texts import default_text, read_text

NEAR, FAR = 128, 512
"""Tokens back: within the shipped policies' window, and within StreamingLLM's."""

KINDS = (
    f"the same two tokens stood at most {NEAR} back",
    f"… {NEAR + 1} to {FAR} back",
    f"… more than {FAR} back",
    "the token alone stood before",
    "a token not seen before",
)


def kinds(ids: Sequence[int]) -> Tensor:
    """For each token but the first, which of `KINDS` it is, [tokens − 1]."""
    pairs: dict[tuple[int, int], int] = {}
    seen, found = {ids[0]}, list[int]()
    for place, pair in enumerate(pairwise(ids), start=1):
        last = pairs.get(pair)
        if last is not None:
            found.append(0 if place - last <= NEAR else 1 if place - last <= FAR else 2)
        else:
            found.append(3 if pair[1] in seen else 4)
        pairs[pair] = place
        seen.add(pair[1])
    return torch.tensor(found)


def mixed(layers: Sequence[int], there: str, elsewhere: str) -> LayerPoliciesSpec:
    """Some layers under one policy, all others under another."""
    return as_layers({"default": elsewhere, "at": {",".join(map(str, layers)): there}})


def said(differences: Tensor) -> str:
    """A mean and its standard error."""
    return f"{float(differences.mean()):+.3f} ± {float(differences.std(correction=0)) / len(differences) ** 0.5:.3f}"


def by_kind(kind: Tensor, full: Tensor, streaming: Tensor, own: Tensor) -> Iterator[str]:
    """A line per kind of token: losses [n] under each."""
    for number, name in enumerate(KINDS):
        here = kind == number
        if not here.any():
            continue
        share = float((own - full)[here].sum() / (own - full).sum())
        yield (
            f"{name:44} {int(here.sum()):5} tokens  full {float(full[here].mean()):.2f}  "
            f"streaming {said((streaming - full)[here])}  policy {said((own - full)[here])}  "
            f"{share:5.0%} of what the policy loses"
        )


def main() -> None:
    """Print a line per kind of token, then one per group of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy")
    parser.add_argument("--text", type=Path, help="left out: the text of memkit compare")
    parser.add_argument("--model", help="a folder or a GGUF file; left out: SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--skip", type=int, default=1024, help="the first token whose loss counts")
    parser.add_argument("--layers", type=int, default=5, help="layers of a group")
    given = parser.parse_args()
    loaded = hf.load(given.model)
    text = default_text() if given.text is None else read_text(given.text)
    ids = loaded.tokenizer(text, verbose=False)["input_ids"][: given.tokens]

    def losses(policies: LayerPoliciesSpec) -> Tensor:
        with hf.attach(loaded.model, policies):
            return loss_by_position(loaded.model, torch.tensor([ids]))[0, given.skip - 1 :]

    full, streaming, own = (losses(as_layers(name)) for name in ("full", "streaming-4-512", given.policy))
    print(f"all: full {float(full.mean()):.3f}  streaming {said(streaming - full)}  policy {said(own - full)}")
    for line in by_kind(kinds(ids)[given.skip - 1 :], full, streaming, own):
        print(line, flush=True)
    depth = loaded.model.config.num_hidden_layers
    for first in range(0, depth, given.layers):
        layers = range(first, min(first + given.layers, depth))
        freed = losses(mixed(layers, "full", given.policy))
        alone = losses(mixed(layers, given.policy, "full"))
        print(
            f"layers {layers[0]:2} to {layers[-1]:2}: full attention there saves {said(own - freed)}, "
            f"the policy there alone costs {said(alone - full)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
