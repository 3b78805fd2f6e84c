"""Laws of merge rules: order, chunks, other slots, heads and rows, and the basis of the space change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from memkit.pieces.merging import Merging
from memkit.testing.agreement import agree, eps_of
from memkit.testing.cases import make
from memkit.testing.law import law
from memkit.testing.laws.merging.tokens import Merge, Tokens, agree_on, sums

__all__ = [
    "associativity",
    "chunks_do_not_matter",
    "isotropy",
    "merging_batch_invariance",
    "order_of_tokens",
]


@law("order of tokens", "merging", claim="order_free")
def order_of_tokens(rule: Merging, example: Merge) -> None:
    """The order of tokens within a chunk does not matter: merge(π tokens) = merge(tokens).

    All of a chunk leaves at once; an engine may add it in any order, and a faster one will.
    """
    tokens = example.tokens(rule)
    turned = torch.arange(len(example.slots)).flip(0)
    agree_on(rule, example, sums(rule, tokens.taken(turned)), sums(rule, tokens), None, "tokens in reverse order: ")


@law("associativity", "merging", claim="associative")
def associativity(rule: Merging, example: Merge) -> None:
    """Merging a then b = merging both: combine(combine(s, a), b) = combine(s, combine(a, b)).

    Then slots may themselves be merged, and sums be taken in parallel.
    """
    generator = torch.Generator().manual_seed(example.seed)
    shape = (1, 3, 1, example.width + example.value_width + 2)
    slot, one, other = (make(example.keys, shape, generator)[0, i] for i in range(3))
    left = rule.combine(rule.combine(slot.clone(), one.clone()), other.clone())
    right = rule.combine(slot.clone(), rule.combine(one.clone(), other.clone()))
    scale = float(torch.stack((slot, one, other)).abs().max()) * 3
    agree({"row": left}, {"row": right}, scales={"row": scale}, eps=eps_of(left.dtype), what="a then b, or both: ")


@law("chunks do not matter", "merging")
def chunks_do_not_matter(rule: Merging, example: Merge) -> None:
    """A slot that takes tokens in two chunks is what it would be after taking them in one.

    merge(a ++ b) = merge(merge(a), b). A rule that keeps a state of its own besides the slot breaks this,
    for the engine runs it again on every backward pass, split and beam.
    """
    founders = sorted(example.founders)
    rest = [j for j in range(len(example.slots)) if j not in example.founders]
    tokens = example.tokens(rule)
    half = max(len(founders), (len(example.slots) + 1) // 2)
    order = torch.tensor(founders + rest)
    tokens = tokens.taken(order)
    if 2 * half > len(order):  # fill the second chunk with tokens that go nowhere
        tokens = _with_dropped(tokens, 2 * half - len(order))
    agree_on(rule, example, sums(rule, tokens, half), sums(rule, tokens), None, "in two chunks: ")


@law("batch invariance", "merging")
def merging_batch_invariance(rule: Merging, example: Merge) -> None:
    """Permuting slots, heads or rows permutes the result, and what stands beside a row changes nothing in it.

    merge(π x) = π merge(x). A rule sees many rows at once; one that looks across them (a batch mean, say) makes a
    text's memory depend on who else was in the batch.
    """
    tokens = example.tokens(rule)
    whole = sums(rule, tokens)
    slots = int(tokens.slot.max()) + 1
    turned = dataclasses.replace(tokens, slot=torch.where(tokens.slot >= 0, slots - 1 - tokens.slot, -1))
    flipped = {name: tensor.flip(2) for name, tensor in sums(rule, turned).items()}
    agree_on(rule, example, flipped, whole, None, "slots in reverse order: ")
    neighbour = dataclasses.replace(example, seed=example.seed + 1).tokens(rule)
    both = Tokens(
        torch.cat((tokens.keys, 7 * neighbour.keys)),
        torch.cat((tokens.values, 7 * neighbour.values)),
        None if tokens.weights is None or neighbour.weights is None else torch.cat((tokens.weights, neighbour.weights)),
        torch.cat((tokens.slot, neighbour.slot)),
        torch.cat((tokens.founded, neighbour.founded)),
    )
    beside = {name: tensor[:1] for name, tensor in sums(rule, both).items()}
    agree_on(rule, example, beside, whole, None, "beside another row: ")
    for head in range(example.heads):
        own = slice(head, head + 1)
        weights = None if tokens.weights is None else tokens.weights[:, own]
        alone = Tokens(tokens.keys[:, own], tokens.values[:, own], weights, tokens.slot[:, own], tokens.founded[:, own])
        here = {name: tensor[:, own] for name, tensor in whole.items()}
        agree_on(rule, example, here, sums(rule, alone), None, f"head {head} among others: ")


@law("isotropy", "merging", claim="isotropic")
def isotropy(rule: Merging, example: Merge) -> None:
    """Rotating the space rotates the slots: merge(k R) = merge(k) R for orthogonal R, values and mass unchanged.

    Attention sees dot products alone; a rule that treats channels apart depends on a basis nobody chose.
    """
    tokens = example.tokens(rule)
    generator = torch.Generator().manual_seed(example.seed)
    turn = torch.linalg.qr(torch.randn(example.width, example.width, generator=generator, dtype=torch.float64))[0]
    turn = turn.to(tokens.keys.dtype)
    expected = sums(rule, tokens)
    expected["key_sum"] = expected["key_sum"] @ turn
    turned = dataclasses.replace(tokens, keys=tokens.keys @ turn)
    agree_on(rule, example, sums(rule, turned), expected, None, "keys rotated first: ")


def _with_dropped(tokens: Tokens, more: int) -> Tokens:
    def longer(tensor: Tensor, fill: Any) -> Tensor:
        return torch.cat((tensor, torch.full_like(tensor[:, :, :1], fill).repeat_interleave(more, 2)), dim=2)

    return Tokens(
        longer(tokens.keys, 1),
        longer(tokens.values, 1),
        None if tokens.weights is None else longer(tokens.weights, 1),
        longer(tokens.slot, -1),
        longer(tokens.founded, False),
    )
