"""Which tokens of a leaving chunk found a slot, and which slot the others join."""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.pieces.routing import Leaving, NearestSpec, SegmentSpec
from memkit.reference.rules import Rules
from memkit.reference.slot import Slot, Token, compared
from memkit.reference.words import TINY, in_order

__all__ = ["Placed", "place"]

Placed = tuple[int, bool]
"""A token's slot (−1: dropped) and whether it founded it."""


def place(rules: Rules, chunk: list[Token], slots: list[Slot], granted: int) -> list[Placed]:
    """All of a chunk is routed before any sum changes. The first S tokens of a row found in any case."""
    forced = min(max(rules.spec.sinks - chunk[0].position, 0), len(chunk))
    if rules.sinks_are_tokens:
        return [(token.position, True) if token.position < rules.spec.sinks else (-1, False) for token in chunk]
    match rules.spec.routing:
        case NearestSpec(kind="nearest", new_slots=new_slots):
            return place_nearest(rules, chunk, slots, granted, forced, new_slots)
        case SegmentSpec(kind="segment"):
            return place_runs(rules, chunk, slots, granted, forced)
        case _:
            return place_otherwise(rules, chunk, slots, granted, forced)


def place_nearest(
    rules: Rules, chunk: list[Token], slots: list[Slot], granted: int, forced: int, new_slots: bool
) -> list[Placed]:
    """Admission says who founds; every other token joins the most similar slot that is no sink."""
    keys, weights = [token.memory_key.detach() for token in chunk], rules.weights(chunk)
    # In an empty memory token 0 founds a slot, and the rest are compared with it.
    opening = compares(rules) and not slots and granted > 0
    known = [rules.alone(chunk[0], weights[0], True)] if opening else slots
    ahead = max(forced, 1) if opening else forced
    free = list(range(ahead, len(chunk)))
    founders = [*range(ahead), *sorted(admitted(rules, free, granted - ahead, keys, known))]
    home = {j: len(slots) + i for i, j in enumerate(founders)}

    targets = list(enumerate(slots))[rules.spec.sinks :]
    for j in founders:
        # Where new slots are no targets, the first slot of an empty memory still is.
        if j >= forced and (new_slots or (opening and j == 0)):
            targets.append((home[j], rules.alone(chunk[j], weights[j], True)))
    there = compared([slot for _, slot in targets], keys[0])
    placed: list[Placed] = []
    for j, key in enumerate(keys):
        if j in home:
            placed.append((home[j], True))
        elif not rules.policy.merging.joins or not targets:
            placed.append((-1, False))
        else:
            scores = similarities(rules, key, there)
            placed.append((targets[scores.index(max(scores))][0], False))  # ties: the lowest slot
    return placed


def compares(rules: Rules) -> bool:
    """Whether admission compares tokens with the slots there are."""
    own = rules.policy.admission
    return rules.spec.admission.kind == "novelty" or (own is not None and own.compares)


def admitted(rules: Rules, free: list[int], wanted: int, keys: list[Tensor], slots: list[Slot]) -> list[int]:
    """Which `wanted` tokens among those with offsets `free` found."""
    if wanted <= 0:
        return []
    match rules.spec.admission.kind:
        case "novelty":
            there = compared(slots, keys[0])
            redundancy = [max(similarities(rules, keys[j], there)) for j in free]
            return [free[i] for i in in_order(redundancy)[:wanted]]
        case "recency":
            return free[len(free) - wanted :]
        case "stride":
            return [free[i * len(free) // wanted] for i in range(wanted)]
        case _:
            rule = rules.policy.admission
            assert rule is not None
            offsets = torch.arange(len(keys)) - (len(keys) - len(free))
            redundancy = None
            if rule.compares:
                there = compared(slots, keys[0])
                best = [max(similarities(rules, key, there)) for key in keys]
                redundancy = torch.tensor(best, dtype=torch.float64)[None, None]
            order = rule.priority(offsets, len(free), wanted, redundancy).expand(1, 1, len(keys))[0, 0]
            return [free[i] for i in in_order([float(order[j]) for j in free])[:wanted]]


def place_runs(rules: Rules, chunk: list[Token], slots: list[Slot], granted: int, forced: int) -> list[Placed]:
    """Sinks found by themselves; the rest are cut into runs ⌊iC/g⌋ … ⌊(i+1)C/g⌋ − 1, each founding one slot."""
    placed: list[Placed] = [(len(slots) + j, True) for j in range(forced)]
    rest, runs = len(chunk) - forced, granted - forced
    newest = len(slots) + forced - 1
    joins = rules.policy.merging.joins
    if runs == 0:  # nobody founds: all join the newest slot that is no sink
        return placed + [(newest if joins else -1, False)] * rest
    for run in range(runs):
        length = (run + 1) * rest // runs - run * rest // runs
        slot = newest + 1 + run
        placed += [(slot, True)] + [(slot if joins else -1, False)] * (length - 1)
    return placed


def place_otherwise(rules: Rules, chunk: list[Token], slots: list[Slot], granted: int, forced: int) -> list[Placed]:
    """A user's own routing."""
    policy, keys = rules.policy, [token.memory_key.detach() for token in chunk]

    def alone() -> Tensor:
        fresh = [rules.alone(token, weight, True) for token, weight in zip(chunk, rules.weights(chunk), strict=True)]
        return compared(fresh, keys[0])[None, None]

    admission = policy.admission
    placement = policy.routing.place(
        Leaving(
            keys=torch.stack(keys)[None, None],
            slots=compared(slots, keys[0])[None, None],
            live=len(slots),
            sinks=rules.spec.sinks,
            forced=forced,
            grant=granted,
            alone=alone,
            joining=policy.merging.joins,
        ),
        None if admission is None else admission.priority,
        admission is not None and admission.compares,
    )
    return list(zip(placement.slot[0, 0].tolist(), placement.founded[0, 0].tolist(), strict=True))


def similarities(rules: Rules, key: Tensor, slots: Tensor) -> list[float]:
    """How near a memory key [d] is to slots' keys as read [m, d]."""
    assert isinstance(rules.spec.routing, NearestSpec)
    match rules.spec.routing.similarity:
        case "dot":
            scores = slots @ key
        case "cosine":
            # One root of whole numbers, so that small integer keys of one direction tie exactly.
            scores = slots @ key / (slots.square().sum(1) * key.square().sum()).sqrt().clamp(min=TINY**2)
        case "l2":
            scores = -(slots - key).square().sum(1)
    return scores.tolist()
