"""Which tokens of a leaving chunk found a slot, and which slot the others join: score, admit, assign."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memkit.pieces.admission import (
    AttentionSpec,
    ExpectedAttentionSpec,
    KeyDifferenceSpec,
    KeyNormSpec,
    OutputErrorSpec,
    RecencySpec,
)
from memkit.pieces.chunk import ChunkContext
from memkit.pieces.evidence import Evidence
from memkit.pieces.routing import NearestSpec, SegmentSpec
from memkit.reference.rules import Rules
from memkit.reference.slot import Slot, Token, compared
from memkit.reference.words import TINY, direction, in_order

__all__ = ["Assigned", "assign", "evidence_of", "nearest_of", "ratings"]

Assigned = tuple[int, bool]
"""A token's slot (−1: dropped) and whether it founded it."""


def assign(
    rules: Rules, chunk: list[Token], slots: list[Slot], new_slots: int, evidence: list[Tensor] | None = None
) -> list[Assigned]:
    """All of a chunk is assigned before any sum changes. The first S tokens of a row found in any case."""
    sink_tokens = min(max(rules.spec.sinks - chunk[0].position, 0), len(chunk))
    if rules.sinks_are_tokens:
        return [(token.position, True) if token.position < rules.spec.sinks else (-1, False) for token in chunk]
    founders = admitted(rules, chunk, slots, new_slots, sink_tokens, evidence)
    home = {j: len(slots) + i for i, j in enumerate(founders)}
    others = joined(rules, chunk, slots, new_slots, sink_tokens, home)
    return [(home[j], True) if j in home else (others[j], False) for j in range(len(chunk))]


def admitted(
    rules: Rules, chunk: list[Token], slots: list[Slot], new_slots: int, sink_tokens: int, evidence: list[Tensor] | None
) -> list[int]:
    """Offsets of the tokens that found, in order: the sinks, then the highest scores, ties to the earliest."""
    if new_slots == len(chunk):
        return list(range(new_slots))
    # Under an admission that compares, token 0 founds a slot in an empty memory, and the rest are compared with it.
    opening = compares(rules) and not slots and new_slots > 0
    ahead = max(sink_tokens, 1) if opening else sink_tokens
    free, wanted = list(range(ahead, len(chunk))), new_slots - ahead
    if rules.spec.admission.kind == "none":
        return runs(rules, chunk, slots, new_slots, sink_tokens)
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
            fresh = [rules.alone(t, weight, True) for t, weight in zip(chunk, rules.weights(chunk), strict=True)]
            shown = context(rules, chunk, slots, new_slots, sink_tokens, evidence)
            scores = ratings(rules, fresh, [token.memory_key for token in chunk], evidence or [], shown)
            chosen = [free[i] for i in in_order([-scores[j] for j in free])[:wanted]]
    return [*range(ahead), *sorted(chosen)]


def runs(rules: Rules, chunk: list[Token], slots: list[Slot], new_slots: int, sink_tokens: int) -> list[int]:
    """Where the routing says who founds: sinks, and the first token of each run ⌊iC/g⌋ … ⌊(i+1)C/g⌋ − 1 of the rest."""
    if isinstance(rules.spec.routing, SegmentSpec) and rules.spec.routing.kind == "segment":
        rest, count = len(chunk) - sink_tokens, new_slots - sink_tokens
        return [*range(sink_tokens), *(sink_tokens + i * rest // count for i in range(count))]
    founded = rules.policy.routing.founders(context(rules, chunk, slots, new_slots, sink_tokens))
    return founded.expand(1, 1, len(chunk))[0, 0].nonzero()[:, 0].tolist()


def compares(rules: Rules) -> bool:
    """Whether admission compares tokens with the slots there are."""
    own = rules.policy.admission
    return rules.spec.admission.kind == "novelty" or (own is not None and own.compares)


def joined(
    rules: Rules, chunk: list[Token], slots: list[Slot], new_slots: int, sink_tokens: int, home: dict[int, int]
) -> list[int]:
    """The slot that each token joins if it founds none, −1 where it is dropped; `home`: founders and their slots."""
    if not rules.policy.merging.joins:
        return [-1] * len(chunk)
    match rules.spec.routing:
        case NearestSpec(kind="nearest", new_slots=joins_new):
            return nearest(rules, chunk, slots, new_slots, sink_tokens, home, joins_new)
        case SegmentSpec(kind="segment"):
            # The newest slot before it that is no sink, or the first one after it.
            newest = [max((home[i] for i in home if i <= j), default=len(slots) - 1) for j in range(len(chunk))]
            return [max(slot, rules.spec.sinks) for slot in newest]
        case _:
            founded = torch.tensor([j in home for j in range(len(chunk))])[None, None]
            targets = rules.policy.routing.targets(
                context(rules, chunk, slots, new_slots, sink_tokens), founded if home else None
            )
            return targets.expand(1, 1, len(chunk))[0, 0].tolist()


def nearest(
    rules: Rules,
    chunk: list[Token],
    slots: list[Slot],
    new_slots: int,
    sink_tokens: int,
    home: dict[int, int],
    joins_new: bool,
) -> list[int]:
    """The most similar slot that is no sink; ties: the lowest."""
    opening = compares(rules) and not slots and new_slots > 0
    weights = rules.weights(chunk)
    targets = list(enumerate(slots))[rules.spec.sinks :]
    for j in home:
        # Where new slots are no targets, the first slot of an empty memory still is.
        if j >= sink_tokens and (joins_new or (opening and j == 0)):
            targets.append((home[j], rules.alone(chunk[j], weights[j], True)))
    if not targets:
        return [-1] * len(chunk)
    return [nearest_of(rules, token.memory_key.detach(), dict(targets)) for token in chunk]


def ratings(rules: Rules, rows: list[Slot], keys: list[Tensor], told: list[Tensor], shown: ChunkContext) -> list[float]:
    """How much each row deserves a slot. keys: as they are compared; told: (mean error, mean share) of each row; shown:
    what a user's own admission is asked about."""
    admission = rules.spec.admission
    match admission:
        case OutputErrorSpec(kind="output-error", pool=1, difference=0):
            return [float(each[0]) for each in told]
        case OutputErrorSpec(kind="output-error", pool=pool, difference=exponent):
            reach, roots = pool // 2, [math.sqrt(float(each[0])) for each in told]
            near = [roots[max(0, j - reach) : j + reach + 1] for j in range(len(roots))]
            differs = differences(keys, [row.answer for row in rows]) if exponent else [1.0] * len(rows)
            return [sum(each) / len(each) * other**exponent for each, other in zip(near, differs, strict=True)]
        case AttentionSpec(kind="attention", value_norm=value_norm, pool=pool):
            reach = pool // 2
            shares = [float(each[1]) for each in told]
            pooled = [sum(shares[max(0, j - reach) : j + reach + 1]) / pool for j in range(len(shares))]
            norms = [float(row.answer.norm().detach()) if value_norm else 1.0 for row in rows]
            return [share * norm for share, norm in zip(pooled, norms, strict=True)]
        case ExpectedAttentionSpec(kind="expected-attention", value_norm=value_norm):
            norms = [float(row.answer.norm().detach()) if value_norm else 1.0 for row in rows]
            return [float(each[1]) * norm for each, norm in zip(told, norms, strict=True)]
        case KeyNormSpec(kind="key-norm"):
            return [-float(key.norm().detach()) for key in keys]
        case KeyDifferenceSpec(kind="key-difference"):
            return [-each for each in likenesses(keys)]
        case RecencySpec(kind="recency"):
            return [float(j) for j in range(len(rows))]
        case _:
            own = rules.policy.admission
            assert own is not None
            return own.score(shown).expand(shown.shape)[0, 0].tolist()


def likenesses(keys: list[Tensor]) -> list[float]:
    """The cosine of each key with the mean of all keys' directions."""
    mean = torch.stack([direction(key) for key in keys]).mean(0)
    return [float((direction(key) @ direction(mean)).detach()) for key in keys]


def differences(keys: list[Tensor], values: list[Tensor]) -> list[float]:
    """How far each row's key points away from the others', times how far its value is from their mean."""
    mean = torch.stack(values).mean(0)
    apart = [float((value - mean).norm().detach()) for value in values]
    return [max(0.0, 1 - like) * far for like, far in zip(likenesses(keys), apart, strict=True)]


def nearest_of(rules: Rules, key: Tensor, slots: dict[int, Slot]) -> int:
    """Of numbered slots the one most like a key, the lowest on ties; −1 where there is none, or none alike enough."""
    if isinstance(rules.spec.routing, SegmentSpec) or not slots:
        return -1
    there = compared(list(slots.values()), key)
    scores = similarities(rules, key, there)
    best = max(scores)
    least = getattr(rules.spec.routing, "least", None)
    return -1 if least is not None and best < least else list(slots)[scores.index(best)]


def context(
    rules: Rules,
    chunk: list[Token],
    slots: list[Slot],
    new_slots: int,
    sink_tokens: int,
    evidence: list[Tensor] | None = None,
) -> ChunkContext:
    """The chunk as a user's own piece is shown it. evidence: (mean error, mean share) of each token."""
    keys = [token.memory_key.detach() for token in chunk]

    def alone() -> Tensor:
        fresh = [rules.alone(token, weight, True) for token, weight in zip(chunk, rules.weights(chunk), strict=True)]
        return compared(fresh, keys[0])[None, None]

    return ChunkContext(
        keys=torch.stack(keys)[None, None],
        slots=compared(slots, keys[0])[None, None],
        slots_before=len(slots),
        sinks=rules.spec.sinks,
        sink_tokens=sink_tokens,
        new_slots=new_slots,
        joins=rules.policy.merging.joins,
        alone=alone,
        read_values=lambda: torch.stack([token.value.detach() for token in chunk])[None, None],
        evidence=evidence_of(evidence),
        similarity=rules.policy.routing.similarity,
    )


def evidence_of(told: list[Tensor] | None) -> Evidence | None:
    """(mean error, mean share) of each row, as a user's own piece is shown them."""
    if not told:
        return None
    error, share = torch.stack(told).detach().unbind(-1)
    return Evidence(error[None, None], share[None, None])


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
