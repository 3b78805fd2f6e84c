"""Laws of admission: which tokens of a leaving chunk found a slot."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from memkit.pieces.admission import Admission
from memkit.pieces.chunk import ChunkContext
from memkit.testing.agreement import identical, show
from memkit.testing.law import Broken, law
from memkit.testing.laws.leaving import LeavingExample

__all__ = [
    "ADMISSION_LAWS",
    "admission_batch_invariance",
    "admission_is_pure",
    "admission_ties",
    "founders_follow_their_tokens",
    "novelty",
    "scores_are_numbers",
]


def chunk_of(example: LeavingExample, keys: Tensor) -> ChunkContext:
    """The chunk, beside slots that make a token's redundancy the first channel of its key.

    There is one slot at least: in an empty memory token 0 founds whatever its score.
    """
    slots = torch.zeros(*keys.shape[:2], max(example.slots_before, 1), keys.shape[3], dtype=keys.dtype)
    slots[..., 0] = 1
    return example.chunk(keys, slots)


def keys_of(example: LeavingExample) -> Tensor:
    """The tokens' keys, [1, g, c, d]."""
    return example.tensors()[0]


def scores(admission: Admission, chunk: ChunkContext) -> Tensor:
    """The admission's scores, [b, g, c]."""
    found = admission.score(chunk)
    try:
        return found.expand(chunk.shape).double()
    except RuntimeError:
        raise Broken(f"score has shape {tuple(found.shape)}, not broadcastable to {tuple(chunk.shape)}") from None


def ranked(admission: Admission, chunk: ChunkContext) -> Tensor:
    """Offsets in the order in which they found, [b, g, c]: sinks, then the highest scores, ties to the earliest."""
    keyed = scores(admission, chunk).masked_fill(chunk.offsets < chunk.sink_tokens, torch.inf)
    return keyed.argsort(dim=-1, descending=True, stable=True)


def founders(admission: Admission, chunk: ChunkContext) -> Tensor:
    """Who founds, sinks apart, [b, g, c] bool."""
    rank = ranked(admission, chunk).argsort(dim=-1)
    return (rank < chunk.new_slots) & (chunk.offsets >= chunk.sink_tokens)


@law("scores are numbers", "admission")
def scores_are_numbers(admission: Admission, example: LeavingExample) -> None:
    """score is one number per token, [b, g, c] or broadcastable to it, and none is NaN.

    An order with NaN in it is whatever the sorting algorithm makes of it.
    """
    found = scores(admission, chunk_of(example, keys_of(example)))
    if bool(found.isnan().any()):
        raise Broken(f"score:\n{show(found)}")


@law("ties", "admission", claim="order_blind")
def admission_ties(admission: Admission, example: LeavingExample) -> None:
    """Of equal tokens the earliest found.

    Ties are common (repeated tokens, zero vectors); left open, they answer differently on another machine.
    """
    found = founders(admission, chunk_of(example, torch.zeros_like(keys_of(example))))[0, 0]
    expected = torch.arange(example.size)
    expected = (expected >= example.sink_tokens) & (expected < example.new_slots)
    if not torch.equal(found, expected):
        raise Broken(f"all tokens equal, {example.new_slots} found: {found.tolist()}, expected {expected.tolist()}")


@law("founders follow their tokens", "admission", claim="order_blind")
def founders_follow_their_tokens(admission: Admission, example: LeavingExample) -> None:
    """Permuting tokens permutes those that found: who found is a matter of what they are, not of where they stand.

    found(π x) = π found(x), for tokens of distinct redundancy.
    """
    free = example.size - example.sink_tokens
    generator = torch.Generator().manual_seed(example.seed)
    keys = keys_of(example)
    keys[..., 0] = torch.randperm(example.size, generator=generator).double()
    turn = torch.cat(
        (torch.arange(example.sink_tokens), example.sink_tokens + torch.randperm(free, generator=generator))
    )
    found = founders(admission, chunk_of(example, keys[:, :, turn]))
    expected = founders(admission, chunk_of(example, keys))[..., turn]
    if not torch.equal(found, expected):
        raise Broken(
            f"tokens {turn.tolist()}, of redundancy {keys[0, 0, turn, 0].tolist()}, found {found[0, 0].tolist()}; "
            f"in their first order those would be {expected[0, 0].tolist()}"
        )


@law("novelty", "admission", claim="novel")
def novelty(admission: Admission, example: LeavingExample) -> None:
    """No token founds that the memory stands for better than for one that does not: max founders ≤ min others.

    A slot spent on what is known already is lost to what is not.
    """
    chunk = chunk_of(example, keys_of(example))
    found, redundancy = founders(admission, chunk), chunk.redundancy
    free = chunk.offsets >= example.sink_tokens
    for head in range(example.heads):
        chosen, others = redundancy[0, head][found[0, head]], redundancy[0, head][free & ~found[0, head]]
        if len(chosen) and len(others) and float(chosen.max()) > float(others.min()):
            raise Broken(f"redundancy of those that found: {chosen.tolist()}, of the others: {others.tolist()}")


@law("batch invariance", "admission")
def admission_batch_invariance(admission: Admission, example: LeavingExample) -> None:
    """A row's order does not depend on other rows or heads, nor on whether counts come as one number or one per row.

    Sorted by score, batch[row] = row. Scores are compared as orders: a rule may scale them as it likes.
    """
    keys = keys_of(example)
    chunk = chunk_of(example, keys)
    alone = ranked(admission, chunk)[..., : example.new_slots]
    neighbour = keys_of(dataclasses.replace(example, seed=example.seed + 1))
    together = chunk_of(example, torch.cat((keys, neighbour)))

    def rows(one: int, other: int) -> Tensor:
        return torch.tensor([one, other]).view(2, 1, 1)

    both = dataclasses.replace(
        together,
        slots_before=rows(max(example.slots_before, 1), max(example.slots_before, 1)),
        sink_tokens=rows(example.sink_tokens, 0),
        new_slots=rows(example.new_slots, 0),
    )
    found = ranked(admission, both)[:1, :, : example.new_slots]
    if not torch.equal(found, alone):
        raise Broken(f"beside another row the order is {found[0, 0].tolist()}, alone {alone[0, 0].tolist()}")
    for head in range(example.heads):
        own = ranked(admission, chunk_of(example, keys[:, head : head + 1]))[0, 0, : example.new_slots]
        if not torch.equal(own, alone[0, head]):
            raise Broken(f"head {head} alone has the order {own.tolist()}, beside others {alone[0, head].tolist()}")


@law("purity", "admission")
def admission_is_pure(admission: Admission, example: LeavingExample) -> None:
    """The same chunk gives the same scores, and its keys, slots and redundancies stay as they were.

    A plan that is made twice must be the same plan.
    """
    chunk = chunk_of(example, keys_of(example))
    before = (chunk.keys.clone(), chunk.slots.clone(), chunk.redundancy.clone())
    first, second = scores(admission, chunk).clone(), scores(admission, chunk)
    after = (chunk.keys, chunk.slots, chunk.redundancy)
    for what, now, then in zip(("keys", "slots' keys", "redundancies"), after, before, strict=True):
        identical(now, f"the {what} were written to", then, "before")
    identical(first, "score, first time", second, "second time", nan=True)


ADMISSION_LAWS = (
    scores_are_numbers,
    admission_ties,
    founders_follow_their_tokens,
    novelty,
    admission_batch_invariance,
    admission_is_pure,
)
