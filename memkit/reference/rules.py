"""What the fields of a policy mean: the window, how many slots there may be, what a token brings to a slot."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, localcontext

import torch
from torch import Tensor

from memkit.engine.inputs import AttendInputs
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
from memkit.pieces.window import AllWindowSpec, BlockWindowSpec, SlidingWindowSpec
from memkit.reference.slot import Slot, Token
from memkit.reference.treatment import Treatment
from memkit.reference.words import as_double, definitely, written_as

__all__ = ["Rules"]

NAMES = ("radius", "key_norm", "value_norm", "position", "founder_mass")
"""The numbers of a slot that are 0 where they are not stored."""


class Rules:
    """A policy's fields, worked out."""

    def __init__(self, inputs: AttendInputs) -> None:
        self.policy = inputs.policy
        self.spec = inputs.policy.spec
        self.scale = inputs.checked_scale
        self.chunk = inputs.policy.chunk
        self.cut_by_caller = self.spec.chunker.kind == "boundaries"
        self.slots_after_chunks = [0]
        self.sinks_are_tokens = self.spec.growth.kind == "none"
        learned = inputs.parameters
        norm_weight = None if learned is None else as_double(learned.key_norm_weight)
        norm_bias = None if learned is None else as_double(learned.key_norm_bias)
        self.treatment = Treatment(inputs.policy, inputs.rotation, norm_weight, norm_bias)
        self.window_scale = None if learned is None else as_double(learned.query_scale_window)
        self.memory_scale = None if learned is None else as_double(learned.query_scale_memory)

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

        m ← m + min(C, max(0, B − m)) as the chunk at b leaves, B = min(share(max(S, budget(n))), b + C);
        n = b + W·C tokens seen, or b + C absorbed.
        """
        growth, size, after = self.spec.growth, self.chunk, self.slots_after_chunks
        if self.sinks_are_tokens:
            return min(self.spec.sinks, left)
        assert isinstance(growth, GrowthSpec)
        while (len(after) - 1) * size < left:
            begin, slots = (len(after) - 1) * size, after[-1]
            counted = begin + ((self.policy.window.capacity or 0) if growth.counts == "seen" else size)
            allowed = min(self.share(max(self.spec.sinks, self.budget(counted))), begin + size)
            new_slots = min(size, max(0, allowed - slots))
            after.append(slots + (size if begin == 0 and growth.first_chunk == "whole" else new_slots))
        return after[left // size] if left else 0

    def share(self, slots: int) -> int:
        """A head's, where growth allows `slots`: the sinks, and its ratio times the others, one at least."""
        others = slots - self.spec.sinks
        return slots if others <= 0 else self.spec.sinks + max(1, math.floor(self.spec.heads.ratio * others + 0.5))

    def new_slots(self, slots: int, begin: int, end: int, arrives: int) -> int:
        """How many of tokens begin … end − 1 found a slot as they leave together, where there are `slots`.

        They leave because the token `arrives` begins a chunk; where the caller says where chunks end.
        """
        growth = self.spec.growth
        if self.sinks_are_tokens:
            return max(0, min(self.spec.sinks, end) - begin)
        assert isinstance(growth, GrowthSpec)
        if begin == 0 and growth.first_chunk == "whole":
            return end
        counted = arrives if growth.counts == "seen" else end
        allowed = min(self.share(max(self.spec.sinks, self.budget(counted))), end)
        return min(end - begin, max(0, allowed - slots))

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

    # What a token weighs, and what it brings to a slot

    def weights(self, chunk: list[Token]) -> list[Tensor]:
        """How much each token weighs, before it is known whether it founds."""
        one = torch.ones_like(chunk[0].key[0])
        if self.sinks_are_tokens:
            return [one] * len(chunk)
        match self.spec.merging:
            case MeanSpec(kind="mean") | DropSpec(kind="drop"):
                return [one] * len(chunk)
            case WeightedMeanSpec(kind="weighted-mean", weight="share"):
                return [one] * len(chunk)  # until they are merged
            case WeightedMeanSpec(kind="weighted-mean", weight="key-norm"):
                return [token.key.norm() for token in chunk]
            case WeightedMeanSpec(kind="weighted-mean", weight="learned"):
                return [definitely(token.weight) for token in chunk]
            case _:
                keys = torch.stack([token.key for token in chunk])[None, None]
                given = [token.weight for token in chunk if token.weight is not None]
                learned = torch.stack(given)[None, None] if given else None
                weights = self.policy.merging.weight(keys, learned)
                return [one] * len(chunk) if weights is None else list(weights.expand(1, 1, len(chunk))[0, 0])

    def alone(self, token: Token, weight: Tensor, founds: bool) -> Slot:
        """What a token brings: a slot of its own if it founds, what it adds to a slot if it joins.

        Founders weigh 1 unless `weigh` says otherwise; in the first chunk the radius stays that of the plain value.
        """
        one, weigh = torch.ones_like(weight), self.policy.merging.weighs
        first = token.first
        if founds and not (weigh.first_chunk if first else weigh.founders):
            weight = one
        for_key, for_value = weight if weigh.keys else one, weight if weigh.values else one
        mass = weight if weigh.keys or weigh.values else one
        over = mass
        if self.policy.merging.of == "values":  # a key is its founder's alone, as it came
            for_key = over = one
        if self.sinks_are_tokens:
            key, for_key, for_value, mass, over = token.key, one, one, one, one
        else:
            key = token.memory_key
        radius = token.value.norm() * (one if first else for_value)
        return Slot(
            treatment=self.treatment,
            key=for_key * key,
            value=for_value * token.value,
            count=one,
            mass=mass,
            radius=radius if founds else torch.zeros_like(radius),
            key_norm=for_key * key.norm(),
            value_norm=for_value * token.value.norm(),
            position=torch.zeros_like(mass) if token.place is None else over * token.place,
            founder_mass=mass if founds else torch.zeros_like(mass),
        )

    def joined(self, slot: Slot, token: Slot) -> Slot:
        """A slot after taking one token."""
        rule = self.policy.merging
        if rule.additive:
            return slot.plus(token)
        # A rule of a user's own sees rows of numbers: the sums, then the statistics the policy keeps.
        both = rule.combine(self.row(slot)[None], self.row(token)[None])[0]
        summed = self.slot(both, width=len(slot.key))
        return replace(summed, count=slot.count + token.count, radius=slot.radius)

    def row(self, slot: Slot) -> Tensor:
        """A slot as a row of numbers."""
        numbers = [getattr(slot, statistic.name) for statistic in self.policy.statistics]
        return torch.cat((slot.key, slot.value, torch.stack(numbers)))

    def slot(self, row: Tensor, width: int) -> Slot:
        """A row of numbers as a slot; what is not stored is not read either, except the mass where all weigh 1."""
        names = [statistic.name for statistic in self.policy.statistics]
        numbers = dict(zip(names, row[len(row) - len(names) :], strict=True))
        zero, one = torch.zeros_like(row[0]), torch.ones_like(row[0])
        count = numbers.get("count", one)
        return Slot(
            treatment=self.treatment,
            key=row[:width],
            value=row[width : len(row) - len(names)],
            count=count,
            mass=numbers.get("mass", count),
            **{
                name: numbers.get(name, zero)
                for name in ("radius", "key_norm", "value_norm", "position", "founder_mass")
            },
        )
