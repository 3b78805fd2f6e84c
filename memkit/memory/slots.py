"""Slots: what they sum, how they take a chunk in, and how they are read.

A token contributes one row: w·k̄ and w·v to its slot's sums, and what its slot's statistics ask for. FOLD is linear
given the plan, hence parallel within a chunk and cheap to differentiate: an additive rule adds all rows of a chunk at
once; another rule takes them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.memory.window import Columns
from memkit.parameters import PolicyParameters
from memkit.pieces.chunk import Assignment
from memkit.pieces.evidence import SHARE, Evidence
from memkit.pieces.rotary import Rotation
from memkit.pieces.statistics import COUNT, MASS, POSITION, Numbers, Tokens
from memkit.policy import Policy

__all__ = [
    "Chunk",
    "Fold",
    "SlotRules",
    "SlotStore",
    "SlotView",
    "contributions",
    "flat_slots",
    "memory_keys",
    "parameter_versions",
    "read_slots",
    "read_tokens",
]


SHARE_EPS = 1e-9
"""Added to a row's share where it is a weight: nobody weighs nothing."""


@dataclass
class Chunk:
    """Tokens that leave the window together.

    keys [b, g, c, d] as they arrived; values [b, g, c, v], None in a plan; weights [b, g, c]; positions [b, 1, c];
    first: whether it is the row's first chunk, or a bool per row [b, 1, 1]; where: its columns of the timeline;
    memory_keys [b, g, c, d]: what slots sum of the keys, None where not taken yet; evidence [b, g, c, 3]: what observed
    queries have told of them.
    """

    keys: Tensor
    values: Tensor | None
    weights: Tensor | None
    positions: Tensor | None
    first: bool | Tensor
    where: Columns
    memory_keys: Tensor | None = None
    evidence: Tensor | None = None

    def of_rows(self, rows: Tensor) -> Chunk:
        """The tokens of some rows of the batch."""
        first = self.first[rows] if isinstance(self.first, Tensor) else self.first
        where = self.where[rows] if isinstance(self.where, Tensor) else self.where
        tensors = (self.keys, self.values, self.weights, self.positions, self.memory_keys, self.evidence)
        keys, values, weights, positions, memory_keys, evidence = (
            None if tensor is None else tensor[rows] for tensor in tensors
        )
        assert keys is not None
        return Chunk(keys, values, weights, positions, first, where, memory_keys, evidence)


@dataclass(frozen=True)
class SlotRules:
    """How one call's slots sum tokens, and how they are read.

    width: channels of a key; dtype: what slots are read in; key_norm: weight and bias of the memory-key LayerNorm, None
    for 1 and 0; valued: whether there are values (a plan does without).
    """

    policy: Policy
    width: int
    dtype: torch.dtype
    key_norm: tuple[Tensor, Tensor] | None
    rotation: Rotation | None
    valued: bool


@dataclass
class SlotView:
    """Slots as they are read: a working copy, which nothing depends on.

    route [b, g, M, d]: keys as routing compares them, float32 or float64; keys [b, g, M, d], values [b, g, M, v]: as
    queries meet them, in the window's dtype; bias [b, g, M]: added to the scores, or None; made_with: the versions of
    the parameters that they were read with.
    """

    route: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    made_with: tuple[int, ...] = ()

    def first(self, count: int) -> SlotView:
        """The first slots."""
        bias = None if self.bias is None else self.bias[:, :, :count]
        return SlotView(self.route[:, :, :count], self.keys[:, :, :count], self.values[:, :, :count], bias)


@dataclass
class Fold:
    """What undoing one fold takes: kept where a backward pass will run through it.

    slot [b, g, c]: each token's slot, −1 where dropped; founders [b, g, c]: which of them founded, None for nobody;
    where, first: as in `Chunk`. sums, numbers: what the slots that were read anew held after the fold (those of the
    chunk's tokens, [b·g·c, …], or all, [b·g·m, …]); before: how they read before it, None where all slots were read
    anew (the sums that the fold before it left tell).
    """

    slot: Tensor
    founders: Tensor | None
    where: Columns
    first: bool | Tensor
    sums: Tensor
    numbers: Tensor
    before: tuple[Tensor | None, ...] | None


@dataclass
class SlotStore:
    """The slots of a memory, with room past the live ones.

    sums [b, g, M, d + v]: key sum and value sum, float32 or float64; numbers [b, g, M, s]: the policy's statistics,
    float64; view: how they are read, where that is at hand; evidence [b, g, M, 3]: what observed queries have told of
    them (see `pieces.evidence`), None where none are observed.
    in_place: whether adding may write into these tensors, or makes new ones, so that autograd can follow.
    undo: every fold so far, where asked for. before_writing: called before tensors are changed in place.
    """

    sums: Tensor
    numbers: Tensor
    view: SlotView | None = None
    evidence: Tensor | None = None
    in_place: bool = True
    undo: list[Fold] | None = None
    before_writing: Callable[[], None] | None = None

    @classmethod
    def empty(cls, policy: Policy, shape: tuple[int, int, int, int], like: Tensor, in_place: bool) -> SlotStore:
        """Room [b, g, M, d + v] with no slot in it, for tokens like these."""
        sums = like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
        numbers = like.new_zeros(*shape[:3], len(policy.statistics), dtype=torch.float64)
        evidence = sums.new_zeros(*shape[:3], 3) if policy.observes else None
        return cls(sums, numbers, evidence=evidence, in_place=in_place)

    @property
    def room(self) -> int:
        """Slots there is room for."""
        return self.sums.shape[2]

    def tensors(self) -> list[Tensor]:
        """All tensors held, the working copy's included."""
        view = self.view
        copies = (self.evidence,) if view is None else (self.evidence, view.route, view.keys, view.values, view.bias)
        return [self.sums, self.numbers, *(tensor for tensor in copies if tensor is not None)]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> SlotStore:
        """A store of changed tensors, without a working copy."""
        evidence = None if self.evidence is None else change(self.evidence)
        return SlotStore(change(self.sums), change(self.numbers), evidence=evidence)

    def read(self, rules: SlotRules) -> SlotView:
        """The slots as they are read."""
        if self.view is None:
            self.view = read_slots(rules, self.sums, self.numbers)
        return self.view

    def grow(self, room: int) -> None:
        """Make room for at least so many slots."""
        missing = room - self.room
        if missing > 0:
            self.sums, self.numbers = _longer(self.sums, missing), _longer(self.numbers, missing)
            self.evidence = None if self.evidence is None else _longer(self.evidence, missing)
            self.view = None

    def add(self, rules: SlotRules, assignment: Assignment, chunk: Chunk) -> None:
        """FOLD: take a chunk in. Dropped tokens have slot −1."""
        if self.room == 0:  # a budget of no slots at all
            return
        rows, numbers = contributions(rules, chunk, assignment.founders)
        stored = assignment.slot >= 0
        target = flat_slots(assignment.slot, self.room)
        if rules.policy.merging.additive:
            if assignment.drops:
                rows, numbers = (tensor.masked_fill(~stored.unsqueeze(-1), 0) for tensor in (rows, numbers))
            self.about_to_write()
            self.sums, self.numbers = self._added(self.sums, target, rows), self._added(self.numbers, target, numbers)
        else:
            self._add_in_turn(rules, target.view(stored.shape), stored, assignment.founded, rows, numbers)
        self._read_anew(rules, assignment, chunk, target)

    def about_to_write(self) -> None:
        """To be called before these tensors, or those of the window beside them, are changed in place."""
        if self.in_place and self.before_writing is not None:
            self.before_writing()

    def replace(self, rules: SlotRules, assignment: Assignment, chunk: Chunk, kept: int, live: int) -> None:
        """FOLD where slots and tokens compete, or are weighed by what their readers told.

        Slots 0 … kept − 1 stay. The candidates, slots kept … live − 1 and then the chunk's tokens, go where the
        assignment says: a founder takes a slot as it is; one that joins adds its sums, scaled to its weight.
        """
        policy, width, competing = rules.policy, rules.width, live - kept
        founded, stored = assignment.founded, assignment.slot >= 0
        rows, numbers = contributions(rules, chunk, founded[:, :, competing:])
        rows = torch.cat((self.sums[:, :, :live], rows.to(self.sums.dtype)), dim=2)
        numbers = torch.cat((self.numbers[:, :, :live], numbers), dim=2)
        # All rows from here on: those that stay are founders of their own slots.
        own = torch.arange(kept, device=rows.device).expand(*rows.shape[:2], -1)
        stays = torch.ones_like(own, dtype=torch.bool)
        slot = torch.cat((own, assignment.slot), dim=2)
        founded, stored = torch.cat((stays, founded), dim=2), torch.cat((stays, stored), dim=2)
        target, joins = flat_slots(slot, self.room), stored & ~founded
        evidence = None
        if self.evidence is not None and chunk.evidence is not None:
            evidence = torch.cat((self.evidence[:, :, :live], chunk.evidence), dim=2)
            there = numbers[..., policy.statistics.index(COUNT)] > 0  # rows may have unequally many slots
            rate = (Evidence.of(evidence).share + SHARE_EPS) * there
            # Of each row's slot: the weight of all that goes there, and whether anybody joins.
            facts = self._summed(target, torch.stack((rate * stored, joins.to(rate.dtype)), dim=-1))[target]
            total, joined = facts.view(*rate.shape, 2).unbind(-1)
            if policy.merging.by_share:  # where nobody joins nothing changes
                rows, numbers = _weighed(rules, rows, numbers, torch.where(joined > 0, rate, 0))
            evidence[..., SHARE] *= torch.where(there, total / torch.where(there, rate, 1), 1)
            evidence.masked_fill_(~founded.unsqueeze(-1), 0)
        if policy.merging.of == "values":
            rows[..., :width].masked_fill_(joins.unsqueeze(-1), 0)
        founders_own = [statistic.founders_own(policy.merging.of) for statistic in policy.statistics]
        numbers = numbers.masked_fill(joins.unsqueeze(-1) & torch.tensor(founders_own, device=rows.device), 0)
        if assignment.drops:
            rows, numbers = (tensor.masked_fill(~stored.unsqueeze(-1), 0) for tensor in (rows, numbers))
        self.about_to_write()
        self.sums = self._summed(target, rows).view(*self.sums.shape)
        self.numbers = self._summed(target, numbers).view(*self.numbers.shape)
        if evidence is not None and self.evidence is not None:
            self.evidence = self._summed(target, evidence).view(*self.evidence.shape)
        self.view = None

    def _summed(self, target: Tensor, rows: Tensor) -> Tensor:
        """Rows [b, g, n, s] summed per slot, [b·g·M, s]."""
        sums = rows.new_zeros(self.sums.shape[0] * self.sums.shape[1] * self.room, rows.shape[-1])
        flat = rows.flatten(0, 2)
        if sums.device.type == "cuda":  # sorts and reduces by segment: the same order every time
            return sums.index_put((target,), flat, accumulate=True)
        return sums.index_add(0, target, flat)

    def of_rows(self, rows: Tensor) -> SlotStore:
        """The slots of some rows of the batch."""
        evidence = None if self.evidence is None else self.evidence[rows]
        return SlotStore(self.sums[rows], self.numbers[rows], evidence=evidence, in_place=False)

    def put_rows(self, rows: Tensor, store: SlotStore) -> None:
        """Replace the slots of some rows of the batch."""
        self.about_to_write()
        self.sums = self.sums.index_copy(0, rows, store.sums)
        self.numbers = self.numbers.index_copy(0, rows, store.numbers)
        if self.evidence is not None and store.evidence is not None:
            self.evidence = self.evidence.index_copy(0, rows, store.evidence)
        self.view = None

    def _added(self, sums: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        flat, rows = sums.flatten(0, 2), rows.flatten(0, 2).to(sums.dtype)
        if sums.device.type == "cuda":
            # Sorts and reduces by segment, where index_add would add in whatever order its threads arrive.
            if self.in_place:
                flat.index_put_((target,), rows, accumulate=True)
                return sums
            return flat.index_put((target,), rows, accumulate=True).view_as(sums)
        if self.in_place:
            flat.index_add_(0, target, rows)
            return sums
        return flat.index_add(0, target, rows).view_as(sums)

    def _add_in_turn(
        self, rules: SlotRules, target: Tensor, stored: Tensor, founded: Tensor, rows: Tensor, numbers: Tensor
    ) -> None:
        """A rule that is not additive: founders first, then token after token, over all rows and heads at once."""
        statistics, combine = rules.policy.statistics, rules.policy.merging.combine
        added = torch.tensor([not statistic.by_rule for statistic in statistics], device=target.device)
        width = self.sums.shape[-1]
        state = torch.cat((self.sums.to(self.numbers.dtype), self.numbers), dim=-1).flatten(0, 2)
        tokens = torch.cat((rows.to(numbers.dtype), numbers), dim=-1)
        # A token may join a slot whose founder stands behind it in the chunk.
        state = state.index_copy(0, target[founded], tokens[founded])
        joins = stored & ~founded
        for index in range(tokens.shape[2]):
            # Asked about these alone: on an empty slot a rule may divide by zero, and 0 · NaN spoils a gradient.
            some = joins[:, :, index]
            where, token = target[:, :, index][some], tokens[:, :, index][some]
            held = state[where]
            both = combine(held, token)
            both = torch.cat((both[:, :width], torch.where(added, (held + token)[:, width:], both[:, width:])), dim=-1)
            state = state.index_copy(0, where, both)
        sums, numbers = state[:, :width].to(self.sums.dtype).view_as(self.sums), state[:, width:].view_as(self.numbers)
        self.about_to_write()
        if self.in_place:
            self.sums.copy_(sums)
            self.numbers.copy_(numbers)
        else:
            self.sums, self.numbers = sums, numbers

    def _read_anew(self, rules: SlotRules, assignment: Assignment, chunk: Chunk, target: Tensor) -> None:
        """Read the slots that a chunk has touched again: few of many, or simply all."""
        few = self.room > assignment.slot.shape[2]
        facts = (assignment.slot, assignment.founders, chunk.where, chunk.first)
        if not few:
            if self.undo is not None:
                sums, numbers = self.sums.flatten(0, 2).clone(), self.numbers.flatten(0, 2).clone()
                self.undo.append(Fold(*facts, sums, numbers, None))
            self.view = None
            return
        if self.undo is None and (self.view is None or not self.in_place):
            self.view = None
            return
        view = self.read(rules)
        sums, numbers = self.sums.flatten(0, 2)[target], self.numbers.flatten(0, 2)[target]
        fresh = read_slots(rules, sums, numbers)
        if self.undo is not None:
            read = (view.keys, view.values, view.bias)
            before = tuple(None if tensor is None else tensor.flatten(0, 2)[target] for tensor in read)
            self.undo.append(Fold(*facts, sums, numbers, before))
        pairs = [(view.keys, fresh.keys), (view.values, fresh.values)]
        if view.route is not view.keys:
            pairs.append((view.route, fresh.route))
        if view.bias is not None and fresh.bias is not None:
            pairs.append((view.bias, fresh.bias))
        for whole, part in pairs:
            whole.flatten(0, 2).index_copy_(0, target, part)


def _longer(tensor: Tensor, missing: int) -> Tensor:
    """[b, g, M, s] with room for so many more."""
    return torch.cat((tensor, tensor.new_zeros(*tensor.shape[:2], missing, tensor.shape[-1])), dim=2)


def flat_slots(slot: Tensor, room: int) -> Tensor:
    """Slot numbers [b, g, c] → rows of tensors seen as [b·g·m, …], m = `room`, flat; slot 0 for dropped tokens."""
    rows, heads = slot.shape[:2]
    base = torch.arange(rows * heads, device=slot.device).view(rows, heads, 1) * room
    return (slot.clamp(min=0) + base).flatten()


def _weighed(rules: SlotRules, rows: Tensor, numbers: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as if their tokens had a weight [b, g, n] in all: scaled by weight / mass; as they are where it is 0.

    The rows are written into.
    """
    policy = rules.policy
    mass = numbers[..., policy.statistics.index(MASS)]
    factor = torch.where((mass > 0) & (weight > 0), weight / torch.where(mass > 0, mass, 1), 1).unsqueeze(-1)
    scaled = torch.tensor([statistic.weighed for statistic in policy.statistics], device=rows.device)
    if policy.merging.of == "values":  # keys are their founder's, whatever it weighs
        rows[..., rules.width :] *= factor.to(rows.dtype)
        scaled = scaled & torch.tensor([not statistic.of_keys for statistic in policy.statistics], device=rows.device)
    else:
        rows *= factor.to(rows.dtype)
    return rows, torch.where(scaled, numbers * factor, numbers)


def memory_keys(rules: SlotRules, chunk: Chunk) -> Tensor:
    """What slots sum of a chunk's keys: [b, g, c, d], float32 or float64."""
    keys = chunk.keys.to(torch.promote_types(chunk.keys.dtype, torch.float32))
    keys = rules.policy.rotary.memory_keys(keys, rules.rotation, chunk.positions)
    return rules.policy.readout.key(keys, {}, rules.key_norm) if rules.policy.readout.layer_norm else keys


def contributions(rules: SlotRules, chunk: Chunk, founded: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token's row of sums [b, g, c, d + v] and of numbers [b, g, c, s], founders weighed as the rule says.

    founded [b, g, c]; None where no token founds.
    """
    policy, keys = rules.policy, memory_keys(rules, chunk) if chunk.memory_keys is None else chunk.memory_keys
    dtype, ones = keys.dtype, torch.ones_like(keys[..., 0])
    values = keys[..., :0] if chunk.values is None else chunk.values.to(dtype)
    for_keys = for_values = for_radius = ones
    weighs = policy.merging.weighs
    weight = policy.merging.weight(chunk.keys, chunk.weights)
    if weight is not None:
        weight = weight.to(dtype)
        if founded is not None and not (weighs.founders and weighs.first_chunk):
            first = _tensor(chunk.first, founded)
            weighed = torch.where(first, _tensor(weighs.first_chunk, founded), _tensor(weighs.founders, founded))
            weight = torch.where(founded & ~weighed, 1, weight)
        for_keys, for_values = weight if weighs.keys else ones, weight if weighs.values else ones
        # In the first chunk the radius stays that of the plain value, even where its sums are weighed.
        for_radius = for_values if chunk.first is False else torch.where(_tensor(chunk.first, ones), 1, for_values)
    mass = for_values if weighs.values else for_keys
    if policy.merging.of == "values":
        for_keys = torch.zeros_like(ones) if founded is None else founded.to(dtype)
    key_mass = for_keys if policy.merging.of == "values" else mass
    tokens = Tokens(keys, values, founded, chunk.positions, for_keys, for_values, for_radius, mass, key_mass)
    numbers = torch.stack([statistic.of(tokens).double() for statistic in policy.statistics], dim=-1)
    if for_keys is for_values:
        rows = torch.cat((keys, values), dim=-1)
        return rows if weight is None else rows * for_keys.unsqueeze(-1), numbers
    return torch.cat((keys * for_keys.unsqueeze(-1), values * for_values.unsqueeze(-1)), dim=-1), numbers


def read_slots(rules: SlotRules, sums: Tensor, numbers: Tensor) -> SlotView:
    """Sums [..., d + v] and numbers [..., s] as they are read, on any leading axes."""
    policy, width, dtype = rules.policy, rules.width, rules.dtype
    keys, values = sums[..., :width], sums[..., width:]
    named = by_statistic(policy, numbers)
    of_keys = named
    if policy.merging.of == "values":  # a slot's key is its founder's
        of_keys = {**named, MASS: (named[COUNT] > 0).to(numbers.dtype)}
    route = keys = policy.readout.key(keys, of_keys, rules.key_norm)
    if policy.rotary.rotates_slots:
        mass = of_keys[MASS]
        keys = policy.rotary.slot_keys(keys, rules.rotation, named[POSITION] / torch.where(mass > 0, mass, 1))
    if not rules.valued:
        return SlotView(route, route, values, None)
    bias = policy.readout.bias(named)
    values = policy.readout.value(values, named)
    return SlotView(route, keys.to(dtype), values.to(dtype), None if bias is None else bias.detach().to(dtype))


def read_tokens(rules: SlotRules, chunk: Chunk) -> Tensor:
    """The chunk's tokens as slots of their own would be read by routing, [b, g, c, d]."""
    everyone = torch.ones(chunk.keys.shape[:3], dtype=torch.bool, device=chunk.keys.device)
    rows, numbers = contributions(rules, chunk, everyone)
    return rules.policy.readout.key(rows[..., : rules.width], by_statistic(rules.policy, numbers), rules.key_norm)


def parameter_versions(parameters: PolicyParameters | None) -> tuple[int, ...]:
    """What the slots as they are read depend on besides their sums: the learned tensors, as they are now."""
    if parameters is None:
        return ()
    # Tensors made in inference mode cannot change unseen, and have no version.
    versions = [(id(each), 0 if each.is_inference() else each._version) for each in parameters.tensors()]
    return tuple(number for pair in versions for number in pair)


def by_statistic(policy: Policy, numbers: Tensor) -> Numbers:
    """A slot's numbers [..., s] by statistic; the mass is the count where every token weighs 1."""
    named: Numbers = dict(zip(policy.statistics, numbers.unbind(-1), strict=True))
    named.setdefault(MASS, named[COUNT])
    return named


def _tensor(condition: bool | Tensor, like: Tensor) -> Tensor:
    return condition if isinstance(condition, Tensor) else torch.full((), condition, device=like.device)
