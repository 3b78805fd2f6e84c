"""Laws of merge rules: nothing is written to, and nothing is kept besides the slot."""

from __future__ import annotations

import torch

from memkit.pieces.merging import Merging
from memkit.testing.agreement import identical
from memkit.testing.law import law
from memkit.testing.laws.merging.tokens import Merge, sums

__all__ = ["merging_is_pure"]


@law("purity", "merging")
def merging_is_pure(rule: Merging, example: Merge) -> None:
    """The same tokens give the same slots, and what the rule is given stays as it was.

    weight and combine return new tensors. The engine still needs the old ones: for the backward pass, and for forks.
    """
    tokens = example.tokens(rule)
    first, second = sums(rule, tokens), sums(rule, tokens)
    for name, tensor in first.items():
        identical(tensor, f"{name}, first time", second[name], "second time", nan=True)
    slot, token = torch.arange(6.0, dtype=torch.float64)[None], torch.ones(1, 6, dtype=torch.float64)
    before = slot.clone(), token.clone()
    rule.combine(slot, token)
    keys, weights = tokens.keys.clone(), torch.ones_like(tokens.keys[..., 0])
    rule.weight(keys, weights)
    for name, now, then in (("combine's slot", slot, before[0]), ("combine's token", token, before[1])):
        identical(now, f"{name} was written to", then, "before")
    identical(keys, "weight's keys were written to", tokens.keys, "before")
    identical(weights, "weight's weights were written to", torch.ones_like(weights), "before")
