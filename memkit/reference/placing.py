"""Which tokens of a leaving chunk found a slot, and which slot the others join: score, admit, assign."""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.pieces.chunk import ChunkContext
from memkit.pieces.routing import NearestSpec, SegmentSpec
from memkit.reference.rules import Rules
from memkit.reference.slot import Slot, Token, compared
from memkit.reference.words import TINY, in_order

__all__ = ["Placed", "place"]

Placed = tuple[int, bool]
"""A token's slot (−1: dropped) and whether it founded it."""


def place(rules: Rules, chunk: list[Token], slots: list[Slot], granted: int) -> list[Placed]:
    """All of a chunk is placed before any sum changes. The first S tokens of a row found in any case."""
    forced = min(max(rules.spec.sinks - chunk[0].position, 0), len(chunk))
    if rules.sinks_are_tokens:
        return [(token.position, True) if token.position < rules.spec.sinks else (-1, False) for token in chunk]
    founders = admitted(rules, chunk, slots, granted, forced)
    home = {j: len(slots) + i for i, j in enumerate(founders)}
    others = joined(rules, chunk, slots, granted, forced, home)
    return [(home[j], True) if j in home else (others[j], False) for j in range(len(chunk))]


def admitted(rules: Rules, chunk: list[Token], slots: list[Slot], granted: int, forced: int) -> list[int]:
    """Offsets of the tokens that found, in order: the sinks, then the highest scores, ties to the earliest."""
    if granted == len(chunk):
        return list(range(granted))
    # Under an admission that compares, token 0 founds a slot in an empty memory, and the rest are compared with it.
    opening = compares(rules) and not slots and granted > 0
    ahead = max(forced, 1) if opening else forced
    free, wanted = list(range(ahead, len(chunk))), granted - ahead
    if rules.spec.admission.kind == "none":
        return runs(rules, chunk, slots, granted, forced)
    if wanted <= 0:
        return list(range(ahead))
    match rules.spec.admission.kind:
        case "novelty":
            known = [rules.alone(chunk[0], rules.weights(chunk)[0], True)] if opening else slots
            there = compared(known, chunk[0].memory_key.detach())
            redundancy = [max(similarities(rules, chunk[j].memory_key.detach(), there)) for j in free]
            chosen = [free[i] for i in in_order(redundancy)[:wanted]]
        case "recency":
            chosen = free[len(free) - wanted :]
        case "stride":
            chosen = [free[i * len(free) // wanted] for i in range(wanted)]
        case _:
            admission = rules.policy.admission
            assert admission is not None
            score = admission.score(context(rules, chunk, slots, granted, forced)).expand(1, 1, len(chunk))[0, 0]
            chosen = [free[i] for i in in_order([-float(score[j]) for j in free])[:wanted]]
    return [*range(ahead), *sorted(chosen)]


def runs(rules: Rules, chunk: list[Token], slots: list[Slot], granted: int, forced: int) -> list[int]:
    """Where the routing says who founds: sinks, and the first token of each run ⌊iC/g⌋ … ⌊(i+1)C/g⌋ − 1 of the rest."""
    if isinstance(rules.spec.routing, SegmentSpec) and rules.spec.routing.kind == "segment":
        rest, count = len(chunk) - forced, granted - forced
        return [*range(forced), *(forced + i * rest // count for i in range(count))]
    founded = rules.policy.routing.founders(context(rules, chunk, slots, granted, forced))
    return founded.expand(1, 1, len(chunk))[0, 0].nonzero()[:, 0].tolist()


def compares(rules: Rules) -> bool:
    """Whether admission compares tokens with the slots there are."""
    own = rules.policy.admission
    return rules.spec.admission.kind == "novelty" or (own is not None and own.compares)


def joined(
    rules: Rules, chunk: list[Token], slots: list[Slot], granted: int, forced: int, home: dict[int, int]
) -> list[int]:
    """The slot that each token joins if it founds none, −1 where it is dropped; `home`: founders and their slots."""
    if not rules.policy.merging.joins:
        return [-1] * len(chunk)
    match rules.spec.routing:
        case NearestSpec(kind="nearest", new_slots=new_slots):
            return nearest(rules, chunk, slots, granted, forced, home, new_slots)
        case SegmentSpec(kind="segment"):
            # The newest slot before it that is no sink, or the first one after it.
            newest = [max((home[i] for i in home if i <= j), default=len(slots) - 1) for j in range(len(chunk))]
            return [max(slot, rules.spec.sinks) for slot in newest]
        case _:
            founded = torch.tensor([j in home for j in range(len(chunk))])[None, None]
            targets = rules.policy.routing.targets(
                context(rules, chunk, slots, granted, forced), founded if home else None
            )
            return targets.expand(1, 1, len(chunk))[0, 0].tolist()


def nearest(
    rules: Rules,
    chunk: list[Token],
    slots: list[Slot],
    granted: int,
    forced: int,
    home: dict[int, int],
    new_slots: bool,
) -> list[int]:
    """The most similar slot that is no sink; ties: the lowest."""
    opening = compares(rules) and not slots and granted > 0
    weights = rules.weights(chunk)
    targets = list(enumerate(slots))[rules.spec.sinks :]
    for j in home:
        # Where new slots are no targets, the first slot of an empty memory still is.
        if j >= forced and (new_slots or (opening and j == 0)):
            targets.append((home[j], rules.alone(chunk[j], weights[j], True)))
    if not targets:
        return [-1] * len(chunk)
    there = compared([slot for _, slot in targets], chunk[0].memory_key.detach())
    found: list[int] = []
    for token in chunk:
        scores = similarities(rules, token.memory_key.detach(), there)
        found.append(targets[scores.index(max(scores))][0])
    return found


def context(rules: Rules, chunk: list[Token], slots: list[Slot], granted: int, forced: int) -> ChunkContext:
    """The chunk as a user's own piece is shown it."""
    keys = [token.memory_key.detach() for token in chunk]

    def alone() -> Tensor:
        fresh = [rules.alone(token, weight, True) for token, weight in zip(chunk, rules.weights(chunk), strict=True)]
        return compared(fresh, keys[0])[None, None]

    return ChunkContext(
        keys=torch.stack(keys)[None, None],
        slots=compared(slots, keys[0])[None, None],
        slots_before=len(slots),
        sinks=rules.spec.sinks,
        sink_tokens=forced,
        new_slots=granted,
        joins=rules.policy.merging.joins,
        alone=alone,
        values=torch.stack([token.value.detach() for token in chunk])[None, None],
        similarity=rules.policy.routing.similarity,
    )


def similarities(rules: Rules, key: Tensor, slots: Tensor) -> list[float]:
    """How near a memory key [d] is to slots' keys as read [m, d]: by the routing's measure, else the dot product."""
    match rules.policy.routing.similarity:
        case "dot":
            scores = slots @ key
        case "cosine":
            # One root of whole numbers, so that small integer keys of one direction tie exactly.
            scores = slots @ key / (slots.square().sum(1) * key.square().sum()).sqrt().clamp(min=TINY**2)
        case "l2":
            scores = -(slots - key).square().sum(1)
    return scores.tolist()
