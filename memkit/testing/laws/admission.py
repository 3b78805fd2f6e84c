"""Laws of admission: which tokens of a leaving chunk found a slot."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from memkit.pieces.admission import Admission
from memkit.testing.agreement import identical, show
from memkit.testing.law import Broken, law
from memkit.testing.laws.leaving import Exit

__all__ = [
    "ADMISSION_LAWS",
    "admission_batch_invariance",
    "admission_is_pure",
    "admission_ties",
    "founders_follow_their_tokens",
    "novelty",
    "priorities_are_numbers",
]


def order(admission: Admission, example: Exit, redundancy: Tensor) -> Tensor:
    """The admission's priorities, [1, g, c] float64."""
    offsets = torch.arange(example.size) - example.forced
    free, grant = example.size - example.forced, example.grant - example.forced
    found = admission.priority(offsets, free, grant, redundancy if admission.compares else None)
    try:
        return found.expand(redundancy.shape).double()
    except RuntimeError:
        raise Broken(
            f"priority has shape {tuple(found.shape)}, not broadcastable to {tuple(redundancy.shape)}"
        ) from None


def redundancy_of(example: Exit) -> Tensor:
    """How well the memory stands for each token, [1, g, c]: any number will do."""
    return example.tensors()[0][..., 0]


def founders(admission: Admission, example: Exit, redundancy: Tensor) -> Tensor:
    """Who founds, sinks apart: those of lowest priority, the earliest first, [1, g, c] bool."""
    offsets = torch.arange(example.size)
    keyed = order(admission, example, redundancy).masked_fill(offsets < example.forced, -torch.inf)
    rank = keyed.argsort(dim=-1, stable=True).argsort(dim=-1)
    return (rank < example.grant) & (offsets >= example.forced)


@law("priorities are numbers", "admission")
def priorities_are_numbers(admission: Admission, example: Exit) -> None:
    """priority is one number per token, [b, g, c] or broadcastable to it, and none is NaN.

    An order with NaN in it is whatever the sorting algorithm makes of it.
    """
    found = order(admission, example, redundancy_of(example))
    if bool(found.isnan().any()):
        raise Broken(f"priority:\n{show(found)}")


@law("ties", "admission", claim="order_blind")
def admission_ties(admission: Admission, example: Exit) -> None:
    """Of equally redundant tokens the earliest found.

    Ties are common (repeated tokens, zero vectors); left open, they answer differently on another machine.
    """
    same = torch.zeros_like(redundancy_of(example))
    found = founders(admission, example, same)[0, 0]
    expected = torch.arange(example.size)
    expected = (expected >= example.forced) & (expected < example.grant)
    if not torch.equal(found, expected):
        raise Broken(f"all equally redundant, {example.grant} found: {found.tolist()}, expected {expected.tolist()}")


@law("founders follow their tokens", "admission", claim="order_blind")
def founders_follow_their_tokens(admission: Admission, example: Exit) -> None:
    """Permuting tokens permutes those that found: who found is a matter of what they are, not of where they stand.

    found(π x) = π found(x), for tokens of distinct redundancy.
    """
    free = example.size - example.forced
    generator = torch.Generator().manual_seed(example.seed)
    redundancy = torch.randperm(example.size, generator=generator).double().expand(1, example.heads, -1)
    turn = torch.cat((torch.arange(example.forced), example.forced + torch.randperm(free, generator=generator)))
    found = founders(admission, example, redundancy[..., turn])
    expected = founders(admission, example, redundancy)[..., turn]
    if not torch.equal(found, expected):
        raise Broken(
            f"tokens {turn.tolist()}, of redundancy {redundancy[0, 0, turn].tolist()}, found {found[0, 0].tolist()}; "
            f"in their first order those would be {expected[0, 0].tolist()}"
        )


@law("novelty", "admission", claim="novel")
def novelty(admission: Admission, example: Exit) -> None:
    """No token founds that the memory stands for better than for one that does not: max founders ≤ min others.

    A slot spent on what is known already is lost to what is not.
    """
    redundancy = redundancy_of(example)
    found = founders(admission, example, redundancy)
    free = torch.arange(example.size) >= example.forced
    for head in range(example.heads):
        chosen, others = redundancy[0, head][found[0, head]], redundancy[0, head][free & ~found[0, head]]
        if len(chosen) and len(others) and float(chosen.max()) > float(others.min()):
            raise Broken(f"redundancy of those that found: {chosen.tolist()}, of the others: {others.tolist()}")


@law("batch invariance", "admission")
def admission_batch_invariance(admission: Admission, example: Exit) -> None:
    """A row's priorities do not depend on other rows or heads, nor on whether grants come as one number or one per row.

    priority(batch)[row] = priority(row).
    """
    example = dataclasses.replace(example, heads=1)
    neighbour = dataclasses.replace(example, seed=example.seed + 1, grant=example.forced)
    both = torch.cat((redundancy_of(example), redundancy_of(neighbour)))
    offsets = torch.arange(example.size) - example.forced
    free = torch.full((2, 1, 1), example.size - example.forced)
    grant = torch.tensor([example.grant - example.forced, 0]).view(2, 1, 1)
    offsets = offsets.expand(2, 1, -1)
    found = admission.priority(offsets, free, grant, both if admission.compares else None).expand(both.shape)[:1]
    alone = order(admission, example, redundancy_of(example))
    # Priorities are compared as orders: a rule may scale them as it likes.
    ranks = [
        p.double().argsort(dim=-1, stable=True)[..., : max(0, example.grant - example.forced)] for p in (found, alone)
    ]
    if example.forced == 0 and not torch.equal(*ranks):
        raise Broken(f"beside another row the order is {ranks[0][0, 0].tolist()}, alone {ranks[1][0, 0].tolist()}")


@law("purity", "admission")
def admission_is_pure(admission: Admission, example: Exit) -> None:
    """The same chunk gives the same order, and the redundancies stay as they were.

    A plan that is made twice must be the same plan.
    """
    redundancy = redundancy_of(example)
    before = redundancy.clone()
    first, second = order(admission, example, redundancy), order(admission, example, redundancy)
    identical(redundancy, "the redundancies were written to", before, "before")
    identical(first, "priority, first time", second, "second time")


ADMISSION_LAWS = (
    priorities_are_numbers,
    admission_ties,
    founders_follow_their_tokens,
    novelty,
    admission_batch_invariance,
    admission_is_pure,
)
