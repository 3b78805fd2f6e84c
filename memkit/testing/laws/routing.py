"""Laws of routing: which slot the tokens of a leaving chunk found or join."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.engine.plan import assign
from memkit.pieces.admission import Admission, Recency
from memkit.pieces.chunk import Assignment, ChunkContext
from memkit.pieces.routing import Nearest, Routing
from memkit.pieces.similarity import similarities
from memkit.testing.agreement import identical, show
from memkit.testing.law import Broken, law
from memkit.testing.laws.leaving import LeavingExample

__all__ = [
    "ROUTING_LAWS",
    "exactly_granted",
    "nearest_slot",
    "new_slots_in_order",
    "routing_batch_invariance",
    "routing_is_pure",
    "sinks_are_no_targets",
    "slots_follow_their_keys",
]


class Lowest(Admission):
    """Who is least similar to the slots there are founds: novelty, written down once more."""

    compares = True

    def score(self, chunk: ChunkContext) -> Tensor:
        return -chunk.redundancy


@dataclass(frozen=True)
class Choice:
    """What of a policy decides where tokens go."""

    admission: Admission | None
    routing: Routing


def place(routing: Routing, example: LeavingExample, keys: Tensor, slots: Tensor) -> Assignment:
    """Where the tokens go."""
    return _place(routing, example, example.chunk(keys, slots, routing.similarity))


def _place(routing: Routing, example: LeavingExample, chunk: ChunkContext) -> Assignment:
    unless_newest = None if routing.founds else Lowest()
    return assign(Choice(Recency() if example.newest else unless_newest, routing), chunk)


def same_places(got: Assignment, what: str, expected: Assignment, other: str) -> None:
    """Raise `Broken` where tokens go elsewhere, or others found."""
    identical(got.slot, f"slots, {what}", expected.slot, other)
    identical(got.founded, f"founders, {what}", expected.founded, other)


@law("exactly as many as granted", "routing")
def exactly_granted(routing: Routing, example: LeavingExample) -> None:
    """Exactly `grant` tokens found, the sinks at the chunk's front among them.

    One more, and the memory outgrows its tensor; one less, and a slot stays empty and is read as zeros.
    """
    assignment = place(routing, example, *example.tensors())
    found = assignment.founded.sum(-1)
    if bool((found != example.new_slots).any()):
        raise Broken(f"{found.tolist()} tokens found, {example.new_slots} may:\n{show(assignment.founded)}")
    if not bool(assignment.founded[..., : example.sink_tokens].all()):
        raise Broken(f"the first {example.sink_tokens} are sinks and found in any case:\n{show(assignment.founded)}")


@law("new slots in order", "routing")
def new_slots_in_order(routing: Routing, example: LeavingExample) -> None:
    """The tokens that found take the next slots in their order; every other token joins one there is, or none.

    So a slot's age and its number agree, sinks are the first slots, and no row of the memory is left out.
    """
    assignment = place(routing, example, *example.tensors())
    for head in range(example.heads):
        slot, found = assignment.slot[0, head], assignment.founded[0, head]
        expected = list(range(example.slots_before, example.slots_before + example.new_slots))
        if slot[found].tolist() != expected:
            raise Broken(f"tokens that found take slots {slot[found].tolist()}, expected {expected}")
        others = slot[~found]
        lowest, highest = (0, example.slots_before + example.new_slots - 1) if example.joining else (-1, -1)
        if bool(((others < lowest) | (others > highest)).any()):
            raise Broken(f"the others go to slots {others.tolist()}, allowed from {lowest} to {highest}")


@law("sinks are no targets", "routing")
def sinks_are_no_targets(routing: Routing, example: LeavingExample) -> None:
    """No token joins a sink, one of long ago or one founded in this very chunk.

    A sink is its own token for ever (arXiv 2309.17453).
    """
    assignment = place(routing, example, *example.tensors())
    joined = assignment.slot[~assignment.founded]
    if bool(((joined >= 0) & (joined < example.sinks)).any()):
        raise Broken(f"tokens join slots {joined.tolist()}, of which the first {example.sinks} are sinks")


@law("nearest slot", "routing", claim="nearest")
def nearest_slot(routing: Nearest, example: LeavingExample) -> None:
    """A token joins the slot of highest similarity that may be joined; of several, the lowest.

    slot_j = min argmax_i similarity(k_j, K_i) over i ≥ S, the newly founded slots included where the rule says so.
    """
    keys, slots = example.tensors()
    assignment = place(routing, example, keys, slots)
    if not example.joining:
        return
    for head in range(example.heads):
        found = assignment.founded[0, head]
        first_only = not getattr(routing, "new_slots", True)
        new = keys[0, head][found]
        if first_only:  # in an empty memory token 0 founds a slot that the others may join
            new = new[: int(example.slots_before == 0 and not example.newest)]
        there = torch.cat((slots[0, head], new))
        scores = similarities(routing.similarity, keys[:, head : head + 1], there[None, None])[0, 0]
        for token in (~found).nonzero().flatten().tolist():
            allowed = scores[token, example.sinks :]
            mine = int(assignment.slot[0, head, token])
            best = float(allowed.max()) if len(allowed) else -torch.inf
            got = float(scores[token, mine]) if 0 <= mine < len(there) else -torch.inf
            slack = 1e-12 * (1 + abs(best)) if example.data != "integers" else 0
            if got < best - slack:
                raise Broken(
                    f"token {token} of head {head} joins slot {mine} of similarity {got}, the highest is {best}: "
                    f"{scores[token].tolist()}"
                )
            if _exact(routing, example) and mine != int(allowed.argmax()) + example.sinks:
                raise Broken(
                    f"token {token} of head {head} joins slot {mine}; of equals the lowest: {allowed.tolist()}"
                )


def _exact(routing: Nearest, example: LeavingExample) -> bool:
    """Whether similarities are exact, so that ties are ties."""
    return example.data == "integers" and routing.similarity in ("dot", "l2")


@law("slots follow their keys", "routing")
def slots_follow_their_keys(routing: Routing, example: LeavingExample) -> None:
    """Permuting the slots there are permutes the targets, sinks staying in front: slot(π K) = π slot(K), ties apart.

    A slot's number says when it was founded, not what it holds.
    """
    keys, slots = example.tensors()
    if not routing.compares or example.slots_before <= example.sinks:
        return
    generator = torch.Generator().manual_seed(example.seed)
    free = example.slots_before - example.sinks
    turn = torch.cat((torch.arange(example.sinks), example.sinks + torch.randperm(free, generator=generator)))
    assignment, turned = place(routing, example, keys, slots), place(routing, example, keys, slots[:, :, turn])
    old = (turned.slot >= 0) & (turned.slot < example.slots_before)
    back = torch.where(old, turn[turned.slot.clamp(0, example.slots_before - 1)], turned.slot)
    permuted = dataclasses.replace(turned, slot=back)
    same_places(permuted, f"slots permuted by {turn.tolist()}", assignment, "expected")


@law("batch invariance", "routing")
def routing_batch_invariance(routing: Routing, example: LeavingExample) -> None:
    """A row's and a head's places do not depend on others, whatever slots and grants those have.

    place(batch)[row] = place(row).
    """
    keys, slots = example.tensors()
    alone = place(routing, example, keys, slots)
    for head in range(example.heads if example.heads > 1 else 0):
        one = dataclasses.replace(example, heads=1)
        own = place(routing, one, keys[:, head : head + 1], slots[:, head : head + 1])
        identical(own.slot, f"slots of head {head} alone", alone.slot[:, head : head + 1], "among others")
    neighbour = dataclasses.replace(
        example, seed=example.seed + 1, slots_before=example.slots_before + 2, sink_tokens=0, new_slots=example.size
    )
    other_keys, other_slots = neighbour.tensors()
    padded = torch.cat((slots, slots.new_full((1, example.heads, 2, example.width), 9.0)), dim=2)

    def rows(one: int, other: int) -> Tensor:
        return torch.tensor([one, other]).view(2, 1, 1)

    both_keys = torch.cat((keys, other_keys))
    chunk = ChunkContext(
        keys=both_keys,
        slots=torch.cat((padded, other_slots)),
        slots_before=rows(example.slots_before, neighbour.slots_before),
        sinks=example.sinks,
        sink_tokens=rows(example.sink_tokens, 0),
        new_slots=rows(example.new_slots, neighbour.new_slots),
        joins=example.joining,
        alone=lambda: both_keys,
        similarity=routing.similarity,
    )
    both = _place(routing, example, chunk)
    mine = Assignment(both.slot[:1], both.founded[:1])
    same_places(mine, "beside another row", alone, "alone")


@law("purity", "routing")
def routing_is_pure(routing: Routing, example: LeavingExample) -> None:
    """The same chunk and the same slots give the same places, and both stay as they were.

    A plan that is made twice must be the same plan; keys and slots are still needed after it is made.
    """
    keys, slots = example.tensors()
    before = keys.clone(), slots.clone()
    first, second = place(routing, example, keys, slots), place(routing, example, keys, slots)
    same_places(first, "first time", second, "second time")
    identical(keys, "the keys were written to", before[0], "before")
    identical(slots, "the slots' keys were written to", before[1], "before")


ROUTING_LAWS = (
    exactly_granted,
    new_slots_in_order,
    sinks_are_no_targets,
    nearest_slot,
    slots_follow_their_keys,
    routing_batch_invariance,
    routing_is_pure,
)
