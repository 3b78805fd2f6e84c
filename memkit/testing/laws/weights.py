"""How much a token weighs, worked out from what a merge rule declares."""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.pieces.merging import Merging

__all__ = ["weights_in_sums"]


def weights_in_sums(
    rule: Merging, keys: Tensor, learned: Tensor | None, founded: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's weight in the key sum, in the value sum and in the mass, each [b, g, n] float64.

    Args:
        rule: whose weights.
        keys: as they arrived, [b, g, n, d].
        learned: the weights given with them, [b, g, n]; None for 1 each.
        founded: which tokens found a slot, [b, g, n] bool.
        first: which are of the first chunk, [n] or [b, g, n] bool.
    """
    ones = torch.ones(founded.shape, dtype=torch.float64)
    if learned is None and rule.learned:
        learned = ones.to(keys.dtype)
    found = rule.weight(keys, learned)
    if found is None:
        return ones, ones, ones
    weigh = rule.weighs
    counts = ~founded | torch.where(first, weigh.first_chunk, weigh.founders)
    weight = torch.where(counts, found.double(), ones)
    return (
        weight if weigh.keys else ones,
        weight if weigh.values else ones,
        weight if weigh.keys or weigh.values else ones,
    )
