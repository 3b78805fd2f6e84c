"""Laws of admission and routing: which tokens of a leaving chunk found a slot, and which slot the others join."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from memkit.pieces.admission import Admission, Recency
from memkit.pieces.routing import Leaving, Nearest, Placement, Routing
from memkit.testing.agreement import show
from memkit.testing.cases import DATA, Data, make
from memkit.testing.law import Broken, law

__all__ = [
    "ADMISSION_LAWS",
    "ROUTING_LAWS",
    "Exit",
    "admission_is_pure",
    "admission_rows_are_strangers",
    "admission_ties",
    "exactly_granted",
    "exits",
    "founders_follow_their_tokens",
    "nearest_slot",
    "new_slots_in_order",
    "novelty",
    "priorities_are_numbers",
    "routing_is_pure",
    "routing_rows_are_strangers",
    "sinks_are_no_targets",
    "slots_follow_their_keys",
]


@dataclass(frozen=True)
class Exit:
    """A chunk that leaves, and the memory it meets.

    size: tokens of the chunk; grant: how many found; forced: how many of those are sinks, at the chunk's front; live:
    slots there are; sinks: how many of those are sinks; joining: whether other tokens join; newest: whether the last
    tokens found, not the most novel ones; heads, width; data, seed.
    """

    size: int = 3
    grant: int = 1
    forced: int = 0
    live: int = 2
    sinks: int = 0
    joining: bool = True
    newest: bool = False
    heads: int = 1
    width: int = 2
    data: Data = "integers"
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Memory keys [1, g, c, d] and the slots' keys as they are read [1, g, m, d], float64."""
        generator = torch.Generator().manual_seed(self.seed)
        keys = make(self.data, (1, self.heads, self.size, self.width), generator)
        return keys, make(self.data, (1, self.heads, self.live, self.width), generator)

    def leaving(self, keys: Tensor, slots: Tensor) -> Leaving:
        """The chunk as a routing is given it."""
        return Leaving(
            keys=keys,
            slots=slots,
            live=self.live,
            sinks=self.sinks,
            forced=self.forced,
            grant=self.grant,
            alone=lambda: keys,
            joining=self.joining,
        )


@st.composite
def exits(draw: st.DrawFn, data: tuple[str, ...] = DATA, min_width: int = 1, joins_new: bool = True) -> Exit:
    """Chunks that leave: grants from none to all, sinks in memory and at the chunk's front, an empty memory.

    joins_new: whether the routing lets tokens join a slot founded in the same step (else an old one must be there).
    """
    size = draw(st.integers(1, 8))
    sinks = draw(st.integers(0, 4))
    live = draw(st.integers(0, 6))
    forced = min(max(sinks - live, 0), size)
    grant = draw(st.integers(forced, size))
    # A token that founds nothing needs a slot to join.
    newest = draw(st.booleans())
    there = live + grant > sinks if joins_new else live > sinks or (live == sinks == 0 < grant and not newest)
    joining = draw(st.booleans()) and (there or grant == size)
    return Exit(
        size=size,
        grant=grant,
        forced=forced,
        live=live,
        sinks=sinks,
        joining=joining,
        newest=newest,
        heads=draw(st.integers(1, 2)),
        width=draw(st.integers(min_width, 4)),
        data=draw(st.sampled_from(data)),  # type: ignore[arg-type]
        seed=draw(st.integers(0, 999)),
    )


def with_margin(joins_new: bool = True) -> st.SearchStrategy[Exit]:
    """Chunks in which no decision is close."""
    return exits(data=("normal",), min_width=3, joins_new=joins_new)


# Admission


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


@law("rows are strangers", "admission")
def admission_rows_are_strangers(admission: Admission, example: Exit) -> None:
    """A row's priorities do not depend on other rows or heads, nor on whether grants come as one number or one per row.

    priority(batch)[row] = priority(row).
    """
    example = dataclasses.replace(example, heads=1)
    stranger = dataclasses.replace(example, seed=example.seed + 1, grant=example.forced)
    both = torch.cat((redundancy_of(example), redundancy_of(stranger)))
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
    if not torch.equal(redundancy, before):
        raise Broken(f"the redundancies were written to:\n{show(redundancy)}\nbefore:\n{show(before)}")
    if not torch.equal(first, second):
        raise Broken(f"priority, first time:\n{show(first)}\nsecond time:\n{show(second)}")


ADMISSION_LAWS = (
    priorities_are_numbers,
    admission_ties,
    founders_follow_their_tokens,
    novelty,
    admission_rows_are_strangers,
    admission_is_pure,
)


# Routing


class Lowest(Admission):
    """Who is least similar to the slots there are founds: novelty, written down once more."""

    compares = True

    def priority(self, offsets: Tensor, free: int | Tensor, grant: int | Tensor, redundancy: Tensor | None) -> Tensor:
        assert redundancy is not None
        return redundancy


def place(routing: Routing, example: Exit, keys: Tensor, slots: Tensor) -> Placement:
    """Where the tokens go."""
    return _place(routing, example, example.leaving(keys, slots))


def _place(routing: Routing, example: Exit, chunk: Leaving) -> Placement:
    if routing.founds:
        return routing.place(chunk, None, False)
    admission = Recency() if example.newest else Lowest()
    return routing.place(chunk, admission.priority, admission.compares)


@law("exactly as many as granted", "routing")
def exactly_granted(routing: Routing, example: Exit) -> None:
    """Exactly `grant` tokens found, the sinks at the chunk's front among them.

    One more, and the memory outgrows its tensor; one less, and a slot stays empty and is read as zeros.
    """
    placement = place(routing, example, *example.tensors())
    found = placement.founded.sum(-1)
    if bool((found != example.grant).any()):
        raise Broken(f"{found.tolist()} tokens found, {example.grant} may:\n{show(placement.founded)}")
    if not bool(placement.founded[..., : example.forced].all()):
        raise Broken(f"the first {example.forced} are sinks and found in any case:\n{show(placement.founded)}")


@law("new slots in order", "routing")
def new_slots_in_order(routing: Routing, example: Exit) -> None:
    """The tokens that found take slots live, live + 1, … in their order; every other token joins one there is, or none.

    So a slot's age and its number agree, sinks are the first slots, and no row of the memory is left out.
    """
    placement = place(routing, example, *example.tensors())
    for head in range(example.heads):
        slot, found = placement.slot[0, head], placement.founded[0, head]
        expected = list(range(example.live, example.live + example.grant))
        if slot[found].tolist() != expected:
            raise Broken(f"tokens that found take slots {slot[found].tolist()}, expected {expected}")
        others = slot[~found]
        lowest, highest = (0, example.live + example.grant - 1) if example.joining else (-1, -1)
        if bool(((others < lowest) | (others > highest)).any()):
            raise Broken(f"the others go to slots {others.tolist()}, allowed from {lowest} to {highest}")


@law("sinks are no targets", "routing")
def sinks_are_no_targets(routing: Routing, example: Exit) -> None:
    """No token joins a sink, one of long ago or one founded in this very chunk.

    A sink is its own token for ever (arXiv 2309.17453).
    """
    placement = place(routing, example, *example.tensors())
    joined = placement.slot[~placement.founded]
    if bool(((joined >= 0) & (joined < example.sinks)).any()):
        raise Broken(f"tokens join slots {joined.tolist()}, of which the first {example.sinks} are sinks")


@law("nearest slot", "routing", claim="nearest")
def nearest_slot(routing: Nearest, example: Exit) -> None:
    """A token joins the slot of highest similarity that may be joined; of several, the lowest.

    slot_j = min argmax_i similarity(k_j, K_i) over i ≥ S, the newly founded slots included where the rule says so.
    """
    keys, slots = example.tensors()
    placement = place(routing, example, keys, slots)
    if not example.joining:
        return
    for head in range(example.heads):
        found = placement.founded[0, head]
        first_only = not getattr(routing, "new_slots", True)
        new = keys[0, head][found]
        if first_only:  # in an empty memory token 0 founds a slot that the others may join
            new = new[: int(example.live == 0 and not example.newest)]
        there = torch.cat((slots[0, head], new))
        scores = routing.similarity(keys[:, head : head + 1], there[None, None])[0, 0]
        for token in (~found).nonzero().flatten().tolist():
            allowed = scores[token, example.sinks :]
            mine = int(placement.slot[0, head, token])
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


def _exact(routing: Nearest, example: Exit) -> bool:
    """Whether similarities are exact, so that ties are ties."""
    return example.data == "integers" and getattr(routing, "kind", None) in ("dot", "l2")


@law("slots follow their keys", "routing")
def slots_follow_their_keys(routing: Routing, example: Exit) -> None:
    """Permuting the slots there are permutes the targets, sinks staying in front: slot(π K) = π slot(K), ties apart.

    A slot's number says when it was founded, not what it holds.
    """
    keys, slots = example.tensors()
    if not routing.compares or example.live <= example.sinks:
        return
    generator = torch.Generator().manual_seed(example.seed)
    free = example.live - example.sinks
    turn = torch.cat((torch.arange(example.sinks), example.sinks + torch.randperm(free, generator=generator)))
    placement, turned = place(routing, example, keys, slots), place(routing, example, keys, slots[:, :, turn])
    old = (turned.slot >= 0) & (turned.slot < example.live)
    back = torch.where(old, turn[turned.slot.clamp(0, example.live - 1)], turned.slot)
    if not torch.equal(back, placement.slot) or not torch.equal(turned.founded, placement.founded):
        raise Broken(f"slots permuted by {turn.tolist()}:\n{show(back)}\nexpected\n{show(placement.slot)}")


@law("rows are strangers", "routing")
def routing_rows_are_strangers(routing: Routing, example: Exit) -> None:
    """A row's and a head's places do not depend on others, whatever slots and grants those have.

    place(batch)[row] = place(row).
    """
    keys, slots = example.tensors()
    alone = place(routing, example, keys, slots)
    for head in range(example.heads if example.heads > 1 else 0):
        one = dataclasses.replace(example, heads=1)
        own = place(routing, one, keys[:, head : head + 1], slots[:, head : head + 1])
        if not torch.equal(own.slot, alone.slot[:, head : head + 1]):
            raise Broken(f"head {head} alone:\n{show(own.slot)}\namong others:\n{show(alone.slot[:, head : head + 1])}")
    stranger = dataclasses.replace(example, seed=example.seed + 1, live=example.live + 2, forced=0, grant=example.size)
    other_keys, other_slots = stranger.tensors()
    padded = torch.cat((slots, slots.new_full((1, example.heads, 2, example.width), 9.0)), dim=2)

    def rows(one: int, other: int) -> Tensor:
        return torch.tensor([one, other]).view(2, 1, 1)

    both_keys = torch.cat((keys, other_keys))
    chunk = Leaving(
        keys=both_keys,
        slots=torch.cat((padded, other_slots)),
        live=rows(example.live, stranger.live),
        sinks=example.sinks,
        forced=rows(example.forced, 0),
        grant=rows(example.grant, stranger.grant),
        alone=lambda: both_keys,
        joining=example.joining,
    )
    both = _place(routing, example, chunk)
    if not torch.equal(both.slot[:1], alone.slot) or not torch.equal(both.founded[:1], alone.founded):
        raise Broken(f"beside another row:\n{show(both.slot[:1])}\nalone:\n{show(alone.slot)}")


@law("purity", "routing")
def routing_is_pure(routing: Routing, example: Exit) -> None:
    """The same chunk and the same slots give the same places, and both stay as they were.

    A plan that is made twice must be the same plan; keys and slots are still needed after it is made.
    """
    keys, slots = example.tensors()
    before = keys.clone(), slots.clone()
    first, second = place(routing, example, keys, slots), place(routing, example, keys, slots)
    if not torch.equal(first.slot, second.slot) or not torch.equal(first.founded, second.founded):
        raise Broken(f"places, first time:\n{show(first.slot)}\nsecond time:\n{show(second.slot)}")
    if not torch.equal(keys, before[0]) or not torch.equal(slots, before[1]):
        raise Broken(f"keys or slots were written to:\n{show(keys)}\n{show(slots)}")


ROUTING_LAWS = (
    exactly_granted,
    new_slots_in_order,
    sinks_are_no_targets,
    nearest_slot,
    slots_follow_their_keys,
    routing_rows_are_strangers,
    routing_is_pure,
)
