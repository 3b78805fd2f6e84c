"""Laws of merge rules: a slot lies among its tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from memkit.pieces.merging import Merging
from memkit.testing.agreement import Results, agree, eps_of, show, size
from memkit.testing.law import Broken, law
from memkit.testing.laws.merging.tokens import Merge, by_slot, sums

__all__ = ["convexity", "duplicates"]


@law("convexity", "merging", claim="convex")
def convexity(rule: Merging, example: Merge) -> None:
    """A slot divided by its mass lies among its tokens: min_j u·k_j ≤ u·K/mass ≤ max_j u·k_j for every u.

    Keys and values. Then a slot looks like its tokens to every query, and never like something nobody said.
    """
    tokens = example.tokens(rule)
    found = sums(rule, tokens)
    generator = torch.Generator().manual_seed(example.seed)
    for name, vectors in (("key_sum", tokens.keys), ("value_sum", tokens.values)):
        vectors = vectors.double()
        for slot in range(int(tokens.slot.max()) + 1):
            inside, mass = tokens.slot[0, 0] == slot, _masses(found)[0, :, slot]
            if not bool((mass > 0).all()):
                continue
            mean = found[name][0, :, slot].double() / mass.unsqueeze(-1)
            for _ in range(3):
                direction = torch.randn(vectors.shape[-1], generator=generator, dtype=torch.float64)
                along, here = vectors[0][:, inside] @ direction, mean @ direction
                slack = 64 * eps_of(tokens.keys.dtype) * size(vectors[0][:, inside]) * float(direction.abs().sum())
                out = torch.maximum(along.amin(-1) - here, here - along.amax(-1))
                if not bool((out <= slack).all()):
                    raise Broken(
                        f"{name} / mass of slot {slot} along {direction.tolist()}: {here.tolist()}; its tokens reach "
                        f"from {along.amin(-1).tolist()} to {along.amax(-1).tolist()}"
                    )


@law("duplicates", "merging", claim="convex")
def duplicates(rule: Merging, example: Merge) -> None:
    """A slot of equal tokens reads as that token: n copies of (k, v) give K/mass = k, V/mass = v and count n.

    Text repeats itself; repeating must not move what is remembered.
    """
    tokens = example.tokens(rule)
    same = dataclasses.replace(
        tokens,
        keys=tokens.keys[:, :, :1].expand_as(tokens.keys),
        values=tokens.values[:, :, :1].expand_as(tokens.values),
    )
    found = sums(rule, same)
    sound = _masses(found) > 0
    for name, vector in (("key_sum", same.keys[:, :, :1]), ("value_sum", same.values[:, :, :1])):
        mean = found[name].double() / torch.where(sound, found["mass"], 1).unsqueeze(-1)
        expected = torch.where(sound.unsqueeze(-1), vector.double(), 0).expand_as(mean)
        mean = torch.where(sound.unsqueeze(-1), mean, 0)
        agree({name: mean}, {name: expected}, scales={name: size(vector)}, eps=eps_of(tokens.keys.dtype))
    counts = by_slot(torch.ones_like(tokens.slot, dtype=torch.float64), tokens.slot)
    agree({"count": found["count"]}, {"count": counts}, scales={}, eps=0)


def _masses(found: Results) -> Tensor:
    """The slots' masses, which must be numbers: no slot can be divided by NaN."""
    mass = found["mass"]
    if not bool(mass.isfinite().all()):
        raise Broken(f"mass:\n{show(mass)}")
    return mass
