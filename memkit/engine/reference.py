"""The oracle: the same mathematics once more, one row, one head, one token after another, in float64.

It shares nothing with the fast engine but the types at its border (`Call`, `Memory`, `Plan`), so that the two can judge
each other. Shipped pieces are read from their specs' fields and worked out here; a user's own piece is asked through
its public methods. Gradients are autograd's.

In the order of the Key-Value Means paper (arXiv 2605.09877, section 3): which tokens a query sees, what a slot is and
how it is read, how many slots there may be, which tokens found and join them, and the softmax over all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memkit.memory import Memory
from memkit.pieces.growth import (
    FixedGrowthSpec,
    GrowthSpec,
    LinearGrowthSpec,
    LogGrowthSpec,
    PowerGrowthSpec,
    SaturatingGrowthSpec,
    SqrtGrowthSpec,
)
from memkit.pieces.merging import DropSpec, MeanSpec, WeightedMeanSpec
from memkit.pieces.rotary import ZeroSpec
from memkit.pieces.routing import Leaving, NearestSpec, SegmentSpec
from memkit.pieces.window import AllWindowSpec, BlockWindowSpec, SlidingWindowSpec
from memkit.plan import Plan

if TYPE_CHECKING:
    from memkit.engine.call import Call
    from memkit.policy import Policy

__all__ = ["attend", "plan"]

TINY = 1e-12
"""The least norm by which a vector is divided."""
LAYER_NORM_EPS = 1e-5

Placed = tuple[int, bool]
"""A token's slot (−1: dropped) and whether it founded it."""


def attend(call: Call) -> tuple[Tensor, Memory]:
    """Outputs [b, h, t, v] in the inputs' dtype and the memory after the call, by the book."""
    queries, memory = call.queries, call.memory
    assert queries is not None and call.values is not None
    if memory is not None:
        memory.check_usable()
        memory.taken = not (call.differentiable or memory.requires_grad)
    group = queries.shape[1] // call.keys.shape[1]
    with torch.set_grad_enabled(call.differentiable):
        rules = Rules(call)
        heads = [[Head(rules, call, r, g) for g in range(call.keys.shape[1])] for r in range(queries.shape[0])]
        silence = call.values.new_zeros(call.values.shape[-1], dtype=torch.float64)
        outputs: list[Tensor] = []
        for r, row in enumerate(heads):
            for i in range(queries.shape[2]):
                if i >= call.lengths[r]:  # padding
                    outputs += [silence] * queries.shape[1]
                    continue
                for head in row:
                    head.arrive(head.seen + i)
                for h in range(queries.shape[1]):
                    head = row[h // group]
                    outputs.append(head.read(queries[r, h, i].double(), h, head.seen + i))
        shape = (queries.shape[0], queries.shape[2], queries.shape[1], len(silence))
        output = stacked(outputs, silence).reshape(shape).transpose(1, 2).to(queries.dtype)
        return output, written(rules, call, heads)


@torch.no_grad()
def plan(call: Call) -> Plan:
    """Where each token goes that leaves the window during the call. Memory is only read."""
    rules = Rules(call)
    rows, heads = call.keys.shape[:2]
    states = [[Head(rules, call, r, g) for g in range(heads)] for r in range(rows)]
    begin = np.array([row[0].left for row in states], dtype=np.int64)
    for r, row in enumerate(states):
        for head in row:
            for i in range(int(call.lengths[r])):
                head.arrive(head.seen + i)
    length = np.array([row[0].left for row in states], dtype=np.int64) - begin
    most = int(length.max())
    slot = torch.full((rows, heads, most), -1, dtype=torch.int64)
    founded = torch.zeros(rows, heads, most, dtype=torch.bool)
    for r, row in enumerate(states):
        for g, head in enumerate(row):
            for j, (where, founds) in enumerate(head.record):
                slot[r, g, j], founded[r, g, j] = where, founds
    chunks = most // rules.chunk if rules.chunk else 0
    slots = [
        [rules.slots(int(begin[r]) + min((i + 1) * rules.chunk, int(length[r]))) for i in range(chunks)]
        for r in range(rows)
    ]
    return Plan(
        slot=slot.to(call.keys.device),
        founded=founded.to(call.keys.device),
        begin=begin,
        length=length,
        slots=np.array(slots, dtype=np.int64).reshape(rows, chunks),
    )


# What a slot is


@dataclass(frozen=True, eq=False)
class Slot:
    """Sums over tokens with weights w; a token alone is one too.

    key [d] = Σ w·k̄, value [v] = Σ w·v, count = Σ 1, mass = Σ w, key_norm = Σ w·‖k̄‖, value_norm = Σ w·‖v‖,
    position = Σ w·position; radius: ‖v‖ of the founder.
    """

    rules: Rules
    key: Tensor
    value: Tensor
    count: Tensor
    mass: Tensor
    radius: Tensor
    key_norm: Tensor
    value_norm: Tensor
    position: Tensor

    def plus(self, token: Slot) -> Slot:
        """The slot with one more token. Its radius is its founder's for ever."""
        return Slot(
            rules=self.rules,
            key=self.key + token.key,
            value=self.value + token.value,
            count=self.count + token.count,
            mass=self.mass + token.mass,
            radius=self.radius,
            key_norm=self.key_norm + token.key_norm,
            value_norm=self.value_norm + token.value_norm,
            position=self.position + token.position,
        )

    @cached_property
    def compared(self) -> Tensor:
        """The key as routing compares it: as it is read, but not rotated."""
        match self.rules.spec.readout.key:
            case "layer-norm":
                return self.rules.layer_norm(self.key)
            case "l2":
                return direction(ratio(self.key, self.mass))
            case "mean-norm":
                return direction(ratio(self.key, self.mass)) * ratio(self.key_norm, self.mass)
            case "mean":
                return ratio(self.key, self.mass)

    @cached_property
    def met(self) -> Tensor:
        """The key as queries meet it."""
        match self.rules.spec.rotary.kind:
            case "rerotate":
                return self.rules.rotated(self.compared, ratio(self.position, self.mass), +1)
            case "keep" | "zero" | "unrotate":
                return self.compared
            case _:
                rotary, mean = self.rules.policy.rotary, ratio(self.position, self.mass)[None, None, None]
                if not rotary.rotates_slots:
                    return self.compared
                return rotary.slot_keys(self.compared[None, None, None], self.rules.rotation, mean)[0, 0, 0]

    @cached_property
    def answer(self) -> Tensor:
        """The value as it is read."""
        match self.rules.spec.readout.value:
            case "birth-radius":
                return direction(self.value) * self.radius
            case "mean-norm":
                return direction(ratio(self.value, self.mass)) * ratio(self.value_norm, self.mass)
            case "count-mean":
                return ratio(self.value, self.count)
            case "mean":
                return ratio(self.value, self.mass)

    @property
    def bias(self) -> Tensor:
        """What is added to its scores."""
        counted = self.rules.spec.readout.count_bias and self.count > 1
        return self.count.log() if counted else torch.zeros_like(self.count)


@dataclass(frozen=True, eq=False)
class Token:
    """One token of one head. place: its rotary position, None where the policy un-rotates nothing."""

    rules: Rules
    position: int
    key: Tensor
    value: Tensor
    weight: Tensor | None
    place: Tensor | None

    @cached_property
    def memory_key(self) -> Tensor:
        """k̄: the key after the rotary treatment, then after the LayerNorm where slots are read with one."""
        key = self.rules.treated(self.key, self.place)
        return self.rules.layer_norm(key) if self.rules.spec.readout.key == "layer-norm" else key


# What the policy's fields mean


class Rules:
    """A policy's fields, worked out."""

    def __init__(self, call: Call) -> None:
        self.policy: Policy = call.policy
        self.spec = call.policy.spec
        self.rotation, self.scale = call.rotation, call.scale
        self.chunk = call.policy.chunk
        self.slots_after_chunks = [0]
        self.sinks_are_tokens = self.spec.growth.kind == "none"
        learned = call.parameters
        self.norm_weight = None if learned is None else as_double(learned.key_norm_weight)
        self.norm_bias = None if learned is None else as_double(learned.key_norm_bias)
        self.window_heat = None if learned is None else as_double(learned.temperature_window)
        self.memory_heat = None if learned is None else as_double(learned.temperature_memory)

    def sees_from(self, position: int) -> int:
        """The first token that the query at `position` sees exactly."""
        match self.spec.window:
            case AllWindowSpec(kind="all"):
                return 0
            case SlidingWindowSpec(kind="sliding", size=size):
                return max(0, position - size + 1)
            case BlockWindowSpec(kind="block", chunks=chunks):
                return max(0, position // self.chunk - chunks + 1) * self.chunk
            case _:
                return int(self.policy.window.begin(position))

    # How many slots

    def slots(self, left: int) -> int:
        """Slots once `left` tokens have left the window.

        m ← m + min(C, max(0, B − m)) as the chunk at b leaves, B = min(max(S, budget(n)), b + C);
        n = b + W·C tokens seen, or b + C absorbed.
        """
        growth, size, after = self.spec.growth, self.chunk, self.slots_after_chunks
        if self.sinks_are_tokens:
            return min(self.spec.sinks, left)
        assert isinstance(growth, GrowthSpec)
        while (len(after) - 1) * size < left:
            begin, slots = (len(after) - 1) * size, after[-1]
            counted = begin + ((self.policy.window.capacity or 0) if growth.counts == "seen" else size)
            allowed = min(max(self.spec.sinks, self.budget(counted)), begin + size)
            granted = min(size, max(0, allowed - slots))
            after.append(slots + (size if begin == 0 and growth.first_chunk == "whole" else granted))
        return after[left // size] if left else 0

    def budget(self, tokens: int) -> int:
        """Slots allowed after so many tokens: min(cap, max(floor, ⌊f(n)⌋ rounded down))."""
        growth = self.spec.growth
        assert isinstance(growth, GrowthSpec) and self.policy.growth is not None
        with localcontext() as context:
            context.prec = 60
            n = Decimal(tokens)
            match growth:
                case FixedGrowthSpec(kind="fixed", slots=slots):
                    size = Decimal(slots)
                case SqrtGrowthSpec(kind="sqrt", factor=factor):
                    size = written_as(factor) * n.sqrt()
                case PowerGrowthSpec(kind="power", factor=factor, exponent=exponent):
                    size = written_as(factor) * n ** written_as(exponent)
                case LogGrowthSpec(kind="log", per_doubling=per_doubling, start=start):
                    size = written_as(per_doubling) * (1 + n / written_as(start)).ln() / Decimal(2).ln()
                case SaturatingGrowthSpec(kind="saturating", limit=limit):
                    size = limit * n / (limit + n)
                case LinearGrowthSpec(kind="linear", fraction=fraction):
                    size = written_as(fraction) * n
                case _:
                    return self.policy.growth.budget(tokens)
            # A power or logarithm of floats that comes within 8 units in the last place of a whole number is that
            # number; of the other formulas' 60 digits only the last may be wrong.
            lift = Decimal(2) ** -49 if isinstance(growth, PowerGrowthSpec | LogGrowthSpec) else Decimal("1e-50")
            floor = math.floor(size * (1 + lift))
        rounded = floor // growth.round_down * growth.round_down
        allowed = max(growth.floor, rounded)
        return allowed if growth.cap is None else min(growth.cap, allowed)

    # What a token brings

    def treated(self, key: Tensor, place: Tensor | None) -> Tensor:
        """A key as the rotary treatment leaves it."""
        rotary = self.spec.rotary
        match rotary.kind:
            case "keep":
                return key
            case "zero":
                assert isinstance(rotary, ZeroSpec)
                width = rotary.width if rotary.width is not None else int((rotary.share or 0) * len(key))
                return torch.cat((torch.zeros_like(key[:width]), key[width:]))
            case "unrotate" | "rerotate":
                assert place is not None
                return self.rotated(key, place, -1)
            case _:
                at = None if place is None else place[None, None, None]
                return self.policy.rotary.memory_keys(key[None, None, None], self.rotation, at)[0, 0, 0]

    def memory_query(self, query: Tensor, place: Tensor | None) -> Tensor:
        """A query as it meets the slots, its temperature apart."""
        match self.spec.rotary.kind:
            case "keep" | "zero" | "rerotate":
                return query
            case "unrotate":
                assert place is not None
                return self.rotated(query, place, -1)
            case _:
                at = None if place is None else place[None, None, None]
                return self.policy.rotary.memory_queries(query[None, None, None], self.rotation, at)[0, 0, 0]

    def rotated(self, vector: Tensor, position: Tensor, sense: int) -> Tensor:
        """Pair i of channels turned by sense · position · frequency_i."""
        rotation = self.rotation
        assert rotation is not None
        half = rotation.width // 2
        if rotation.pairing == "adjacent":
            first, second = list(range(0, rotation.width, 2)), list(range(1, rotation.width, 2))
        else:
            first, second = list(range(half)), list(range(half, rotation.width))
        angle = sense * position * rotation.frequencies.to(vector.device).double()
        x, y = vector[first], vector[second]
        turned = vector.clone()
        turned[first] = x * angle.cos() - y * angle.sin()
        turned[second] = y * angle.cos() + x * angle.sin()
        return turned

    def layer_norm(self, vector: Tensor) -> Tensor:
        """(x − mean) / √(variance + eps) · weight + bias."""
        centred = vector - vector.mean()
        normed = centred / (centred.square().mean() + LAYER_NORM_EPS).sqrt()
        if self.norm_weight is not None:
            normed = normed * self.norm_weight
        return normed if self.norm_bias is None else normed + self.norm_bias

    def weights(self, chunk: list[Token]) -> list[Tensor]:
        """How much each token weighs, before it is known whether it founds."""
        one = torch.ones_like(chunk[0].key[0])
        if self.sinks_are_tokens:
            return [one] * len(chunk)
        match self.spec.merging:
            case MeanSpec(kind="mean") | DropSpec(kind="drop"):
                return [one] * len(chunk)
            case WeightedMeanSpec(kind="weighted-mean", weight="key-norm"):
                return [token.key.norm() for token in chunk]
            case WeightedMeanSpec(kind="weighted-mean", weight="learned"):
                return [definitely(token.weight) for token in chunk]
            case _:
                keys = torch.stack([token.key for token in chunk])[None, None]
                given = [token.weight for token in chunk if token.weight is not None]
                learned = torch.stack(given)[None, None] if given else None
                found = self.policy.merging.weight(keys, learned)
                return [one] * len(chunk) if found is None else list(found.expand(1, 1, len(chunk))[0, 0])

    def alone(self, token: Token, weight: Tensor, founds: bool) -> Slot:
        """What a token brings: a slot of its own if it founds, what it adds to a slot if it joins.

        Founders weigh 1 unless `weigh` says otherwise; in the first chunk the radius stays that of the plain value.
        """
        one, weigh = torch.ones_like(weight), self.policy.merging.weighs
        first = token.position < self.chunk
        if founds and not (weigh.first_chunk if first else weigh.founders):
            weight = one
        for_key, for_value = weight if weigh.keys else one, weight if weigh.values else one
        mass = weight if weigh.keys or weigh.values else one
        if self.sinks_are_tokens:
            key, for_key, for_value, mass = token.key, one, one, one
        else:
            key = token.memory_key
        radius = token.value.norm() * (one if first else for_value)
        return Slot(
            rules=self,
            key=for_key * key,
            value=for_value * token.value,
            count=one,
            mass=mass,
            radius=radius if founds else torch.zeros_like(radius),
            key_norm=for_key * key.norm(),
            value_norm=for_value * token.value.norm(),
            position=torch.zeros_like(mass) if token.place is None else mass * token.place,
        )

    def joined(self, slot: Slot, token: Slot) -> Slot:
        """A slot after taking one token."""
        rule = self.policy.merging
        if rule.additive:
            return slot.plus(token)
        # A rule of a user's own sees rows of numbers: the sums, then the columns the policy stores.
        both = rule.combine(self.row(slot)[None], self.row(token)[None])[0]
        summed = self.slot(both, width=len(slot.key))
        return replace(summed, count=slot.count + token.count, radius=slot.radius)

    def row(self, slot: Slot) -> Tensor:
        """A slot as a row of numbers."""
        columns = [getattr(slot, name) for name in self.policy.columns]
        return torch.cat((slot.key, slot.value, torch.stack(columns) if columns else slot.key[:0]))

    def slot(self, row: Tensor, width: int) -> Slot:
        """A row of numbers as a slot; what is not stored is not read either, except the mass where all weigh 1."""
        names = self.policy.columns
        numbers = dict(zip(names, row[len(row) - len(names) :], strict=True))
        zero, one = torch.zeros_like(row[0]), torch.ones_like(row[0])
        count = numbers.get("count", one)
        return Slot(
            rules=self,
            key=row[:width],
            value=row[width : len(row) - len(names)],
            count=count,
            mass=numbers.get("mass", count),
            **{name: numbers.get(name, zero) for name in ("radius", "key_norm", "value_norm", "position")},
        )

    # Which tokens found, and where the others go

    def similarities(self, key: Tensor, slots: Tensor) -> list[float]:
        """How near a memory key [d] is to slots' keys as read [m, d]."""
        assert isinstance(self.spec.routing, NearestSpec)
        match self.spec.routing.similarity:
            case "dot":
                scores = slots @ key
            case "cosine":
                # One root of whole numbers, so that small integer keys of one direction tie exactly.
                scores = slots @ key / (slots.square().sum(1) * key.square().sum()).sqrt().clamp(min=TINY**2)
            case "l2":
                scores = -(slots - key).square().sum(1)
        return scores.tolist()

    def place(self, chunk: list[Token], slots: list[Slot], granted: int) -> list[Placed]:
        """All of a chunk is routed before any sum changes. The first S tokens of a row found in any case."""
        forced = min(max(self.spec.sinks - chunk[0].position, 0), len(chunk))
        if self.sinks_are_tokens:
            return [(token.position, True) if token.position < self.spec.sinks else (-1, False) for token in chunk]
        match self.spec.routing:
            case NearestSpec(kind="nearest", new_slots=new_slots):
                return self.place_nearest(chunk, slots, granted, forced, new_slots)
            case SegmentSpec(kind="segment"):
                return self.place_runs(chunk, slots, granted, forced)
            case _:
                return self.place_otherwise(chunk, slots, granted, forced)

    def place_nearest(
        self, chunk: list[Token], slots: list[Slot], granted: int, forced: int, new_slots: bool
    ) -> list[Placed]:
        """Admission says who founds; every other token joins the most similar slot that is no sink."""
        keys, weights = [token.memory_key.detach() for token in chunk], self.weights(chunk)
        # In an empty memory token 0 founds a slot, and the rest are judged against it.
        opening = self.compares and not slots and granted > 0
        known = [self.alone(chunk[0], weights[0], True)] if opening else slots
        ahead = max(forced, 1) if opening else forced
        free = list(range(ahead, len(chunk)))
        founders = [*range(ahead), *sorted(self.admitted(free, granted - ahead, keys, known))]
        home = {j: len(slots) + i for i, j in enumerate(founders)}

        targets = list(enumerate(slots))[self.spec.sinks :]
        for j in founders:
            # Where new slots are no targets, the first slot of an empty memory still is.
            if j >= forced and (new_slots or (opening and j == 0)):
                targets.append((home[j], self.alone(chunk[j], weights[j], True)))
        there = compared([slot for _, slot in targets], keys[0])
        placed: list[Placed] = []
        for j, key in enumerate(keys):
            if j in home:
                placed.append((home[j], True))
            elif not self.policy.merging.joins or not targets:
                placed.append((-1, False))
            else:
                scores = self.similarities(key, there)
                placed.append((targets[scores.index(max(scores))][0], False))  # ties: the lowest slot
        return placed

    @property
    def compares(self) -> bool:
        """Whether admission judges tokens by the slots there are."""
        own = self.policy.admission
        return self.spec.admission.kind == "novelty" or (own is not None and own.compares)

    def admitted(self, free: list[int], wanted: int, keys: list[Tensor], slots: list[Slot]) -> list[int]:
        """Which `wanted` tokens among those with offsets `free` found."""
        if wanted <= 0:
            return []
        match self.spec.admission.kind:
            case "novelty":
                there = compared(slots, keys[0])
                redundancy = [max(self.similarities(keys[j], there)) for j in free]
                return [free[i] for i in in_order(redundancy)[:wanted]]
            case "recency":
                return free[len(free) - wanted :]
            case "stride":
                return [free[i * len(free) // wanted] for i in range(wanted)]
            case _:
                rule = self.policy.admission
                assert rule is not None
                offsets = torch.arange(len(keys)) - (len(keys) - len(free))
                redundancy = None
                if rule.compares:
                    there = compared(slots, keys[0])
                    best = [max(self.similarities(key, there)) for key in keys]
                    redundancy = torch.tensor(best, dtype=torch.float64)[None, None]
                order = rule.priority(offsets, len(free), wanted, redundancy).expand(1, 1, len(keys))[0, 0]
                return [free[i] for i in in_order([float(order[j]) for j in free])[:wanted]]

    def place_runs(self, chunk: list[Token], slots: list[Slot], granted: int, forced: int) -> list[Placed]:
        """Sinks found by themselves; the rest are cut into runs ⌊iC/g⌋ … ⌊(i+1)C/g⌋ − 1, each founding one slot."""
        placed: list[Placed] = [(len(slots) + j, True) for j in range(forced)]
        rest, runs = len(chunk) - forced, granted - forced
        newest = len(slots) + forced - 1
        joins = self.policy.merging.joins
        if runs == 0:  # nobody founds: all join the newest slot that is no sink
            return placed + [(newest if joins else -1, False)] * rest
        for run in range(runs):
            length = (run + 1) * rest // runs - run * rest // runs
            slot = newest + 1 + run
            placed += [(slot, True)] + [(slot if joins else -1, False)] * (length - 1)
        return placed

    def place_otherwise(self, chunk: list[Token], slots: list[Slot], granted: int, forced: int) -> list[Placed]:
        """A user's own routing."""
        policy, keys = self.policy, [token.memory_key.detach() for token in chunk]

        def alone() -> Tensor:
            fresh = [self.alone(token, weight, True) for token, weight in zip(chunk, self.weights(chunk), strict=True)]
            return compared(fresh, keys[0])[None, None]

        admission = policy.admission
        placement = policy.routing.place(
            Leaving(
                keys=torch.stack(keys)[None, None],
                slots=compared(slots, keys[0])[None, None],
                live=len(slots),
                sinks=self.spec.sinks,
                forced=forced,
                grant=granted,
                alone=alone,
                joining=policy.merging.joins,
            ),
            None if admission is None else admission.priority,
            admission is not None and admission.compares,
        )
        return list(zip(placement.slot[0, 0].tolist(), placement.founded[0, 0].tolist(), strict=True))


# One row, one key/value head


class Head:
    """The stream of one row and one key/value head: the tokens it still holds, and its slots.

    seen: tokens before this call; left: tokens that have left the window; origin: the first token held.
    """

    def __init__(self, rules: Rules, call: Call, row: int, head: int) -> None:
        self.rules, memory = rules, call.memory
        self.seen = 0 if memory is None else int(memory.seen_rows[row])
        self.left = 0 if self.seen == 0 else rules.sees_from(self.seen - 1)
        self.origin, held = self.left, self.seen - self.left
        self.given = None if call.plan is None else (call.plan, row, head)
        self.slots: list[Slot] = []
        self.record: list[Placed] = []
        self.as_read: tuple[Tensor, Tensor, Tensor] | None = None

        new = slice(0, int(call.lengths[row]))
        keys, values = call.keys[row, head, new].double(), None
        if call.values is not None:
            values = call.values[row, head, new].double()
        learned = self.rules.policy.merging.learned and not rules.sinks_are_tokens
        weights = keys.new_ones(len(keys)) if learned else None
        if call.weights is not None:
            weights = call.weights[row, head, new].double()
        places = new_places(rules, call, row)
        if memory is not None:
            old = slice(memory.end - held, memory.end)
            keys = torch.cat((memory.keys[row, head, old].double(), keys))
            if values is not None:
                values = torch.cat((memory.values[row, head, old].double(), values))
            if weights is not None and memory.weights is not None:
                weights = torch.cat((memory.weights[row, head, old].double(), weights))
            if places is not None and memory.positions is not None:
                places = torch.cat((memory.positions[row, old], places))
            width = keys.shape[1] + (0 if values is None else memory.values.shape[-1])
            for index in range(rules.slots(self.left)):
                sums = memory.sums[row, head, index, :width].double()
                self.slots.append(rules.slot(torch.cat((sums, memory.scalars[row, head, index])), keys.shape[1]))
        self.keys, self.weights, self.places = keys, weights, places
        # A plan is made without values.
        self.values = keys[:, :0] if values is None else values

    def token(self, position: int) -> Token:
        """The token at `position`, which must still be held."""
        at = position - self.origin
        return Token(
            rules=self.rules,
            position=position,
            key=self.keys[at],
            value=self.values[at],
            weight=None if self.weights is None else self.weights[at],
            place=None if self.places is None else self.places[at],
        )

    def arrive(self, position: int) -> None:
        """A token arrives: what it no longer sees leaves the window, chunk by chunk."""
        while self.left < self.rules.sees_from(position):
            self.leave()

    def leave(self) -> None:
        """The oldest chunk becomes part of the slots."""
        rules, begin, before = self.rules, self.left, len(self.slots)
        chunk = [self.token(position) for position in range(begin, begin + rules.chunk)]
        granted = rules.slots(begin + rules.chunk) - rules.slots(begin)
        placed = self.from_plan(begin) if self.given is not None else rules.place(chunk, self.slots, granted)
        weights = rules.weights(chunk)
        self.slots += [self.nothing()] * granted
        # Founders first, so that a token may join a slot whose founder stands behind it in the chunk.
        for token, weight, (slot, founds) in zip(chunk, weights, placed, strict=True):
            if founds:
                assert slot >= before
                self.slots[slot] = rules.alone(token, weight, founds=True)
        for token, weight, (slot, founds) in zip(chunk, weights, placed, strict=True):
            if slot >= 0 and not founds:
                self.slots[slot] = rules.joined(self.slots[slot], rules.alone(token, weight, founds=False))
        self.record += placed
        self.left = begin + rules.chunk
        self.as_read = None

    def from_plan(self, begin: int) -> list[Placed]:
        """What an injected plan says about the chunk at `begin`."""
        assert self.given is not None
        given, row, head = self.given
        columns = range(begin - int(given.begin[row]), begin - int(given.begin[row]) + self.rules.chunk)
        return [(int(given.slot[row, head, j]), bool(given.founded[row, head, j])) for j in columns]

    def nothing(self) -> Slot:
        """A slot without tokens."""
        width = self.keys.shape[1] + self.values.shape[1] + len(self.rules.policy.columns)
        return self.rules.slot(self.keys.new_zeros(width), self.keys.shape[1])

    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """The slots' keys as queries meet them [m, d], values [m, v], and what their scores get on top [m]."""
        if self.as_read is None:
            exact = self.rules.sinks_are_tokens
            keys = [slot.key if exact else slot.met for slot in self.slots]
            values = [slot.value if exact else slot.answer for slot in self.slots]
            biases = [torch.zeros_like(slot.count) if exact else slot.bias for slot in self.slots]
            self.as_read = (
                stacked(keys, self.keys[0]),
                stacked(values, self.values[0]),
                stacked(biases, self.keys[0, 0]),
            )
        return self.as_read

    def read(self, query: Tensor, head: int, position: int) -> Tensor:
        """The answer [v] to query head `head` at `position`: one softmax over slots and visible tokens.

        scale · τ_mem · q·K_i + bias_i for slots, scale · τ_win · q·k_j for tokens; sinks of a policy without growth
        are tokens wherever they stand.
        """
        rules = self.rules
        visible = slice(rules.sees_from(position) - self.origin, position + 1 - self.origin)
        windowed = query if rules.window_heat is None else rules.window_heat[head] * query
        if rules.sinks_are_tokens:
            remembering = windowed
        else:
            place = None if self.places is None else self.places[position - self.origin]
            remembering = rules.memory_query(query, place)
            if rules.memory_heat is not None:
                remembering = rules.memory_heat[head] * remembering
        keys, values, biases = self.memory()
        of_slots = rules.scale * (keys @ remembering) + biases
        of_tokens = rules.scale * (self.keys[visible] @ windowed)
        shares = torch.cat((of_slots, of_tokens)).softmax(0)
        return shares @ torch.cat((values, self.values[visible]))


def new_places(rules: Rules, call: Call, row: int) -> Tensor | None:
    """Rotary positions of a row's new tokens, [n] float64: as given, else going on where the memory stands."""
    if not rules.policy.needs_rotation:
        return None
    assert call.rotation is not None
    count = int(call.lengths[row])
    if call.rotation.positions is not None:
        return call.rotation.positions[row, :count].double().to(call.keys.device)
    begin = call.keys.new_zeros((), dtype=torch.float64)
    if call.memory is not None and call.memory.next_positions is not None:
        begin = call.memory.next_positions[row]
    return begin + torch.arange(count, dtype=torch.float64, device=call.keys.device)


# What is carried on


def written(rules: Rules, call: Call, heads: list[list[Head]]) -> Memory:
    """The memory after the call, in the layout that `Memory` describes."""
    keys, before = call.keys, call.memory
    first = [row[0] for row in heads]
    seen = np.array([head.seen + int(length) for head, length in zip(first, call.lengths, strict=True)], dtype=np.int64)
    keep = max(int(tokens) - head.left for tokens, head in zip(seen, first, strict=True))

    def window(row: Callable[[Head], Tensor], dtype: torch.dtype) -> Tensor:
        """What each head's window holds, newest last, zeros before it."""
        return torch.stack(
            [torch.stack([newest(row(head)[head.left - head.origin :]) for head in r]) for r in heads]
        ).to(dtype)

    def newest(held: Tensor) -> Tensor:
        return torch.cat((held.new_zeros(keep - len(held), *held.shape[1:]), held))

    most = max(len(head.slots) for row in heads for head in row)
    columns = len(rules.policy.columns)

    def filled(head: Head) -> Tensor:
        rows = [rules.row(slot) for slot in head.slots]
        return torch.stack(rows + [rules.row(head.nothing())] * (most - len(rows))) if most else head.keys[:0]

    sums_width = keys.shape[-1] + first[0].values.shape[-1]
    rows = torch.stack([torch.stack([filled(head) for head in row]) for row in heads])
    if most == 0:
        rows = rows.new_zeros(*rows.shape[:2], 0, sums_width + columns)
    weights = positions = next_positions = None
    if first[0].weights is not None:
        dtype = keys.dtype if call.weights is None else call.weights.dtype
        if before is not None and before.weights is not None:
            dtype = torch.promote_types(dtype, before.weights.dtype)
        weights = window(lambda head: definitely(head.weights), dtype)
    if first[0].places is not None:
        positions = window(lambda head: definitely(head.places), torch.float64)[:, 0]
        next_positions = torch.stack([going_on(call, head, r) for r, head in enumerate(first)])
    return Memory(
        policy=rules.policy,
        seen_rows=seen,
        end=keep,
        keys=window(lambda head: head.keys, keys.dtype),
        values=window(lambda head: head.values, keys.dtype),
        weights=weights,
        positions=positions,
        next_positions=next_positions,
        sums=rows[..., :sums_width].to(torch.promote_types(keys.dtype, torch.float32)),
        scalars=rows[..., sums_width:],
    )


def going_on(call: Call, head: Head, row: int) -> Tensor:
    """The position of a row's next token."""
    if call.lengths[row]:
        return definitely(head.places)[-1] + 1
    if call.memory is not None and call.memory.next_positions is not None:
        return call.memory.next_positions[row]
    return head.keys.new_zeros(())


# Small words


def direction(vector: Tensor) -> Tensor:
    """x / ‖x‖, 0 for 0."""
    return vector / vector.norm().clamp(min=TINY)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 where the whole is 0 (a slot without mass is read as zero)."""
    return part / whole if whole > 0 else torch.zeros_like(part)


def in_order(scores: list[float]) -> list[int]:
    """Indices from the lowest score to the highest; ties: the earliest."""
    return sorted(range(len(scores)), key=lambda i: scores[i])


def stacked(vectors: list[Tensor], like: Tensor) -> Tensor:
    """Vectors as rows, none of them included."""
    return torch.stack(vectors) if vectors else like.new_zeros(0, *like.shape)


def compared(slots: list[Slot], like: Tensor) -> Tensor:
    """Slots' keys as routing compares them, [m, d], without a gradient."""
    return stacked([slot.compared.detach() for slot in slots], like)


def written_as(number: float) -> Decimal:
    """The number as a person wrote it: 0.1 is one tenth."""
    return Decimal(repr(number))


def as_double(tensor: Tensor | None) -> Tensor | None:
    """The tensor in float64, if there is one."""
    return None if tensor is None else tensor.double()


def definitely(tensor: Any) -> Tensor:
    """A tensor that cannot be missing here."""
    assert tensor is not None
    return tensor
