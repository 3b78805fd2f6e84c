"""FOLD: the sums per slot. Linear given the plan, hence parallel within a chunk and cheap to differentiate.

A token contributes one row: w·k̄ and w·v to its slot's sums, and its weight, count, norms and position to the slot's
scalars. An additive rule adds all rows of a chunk at once; another takes them one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.engine.call import Call
from memkit.memory import Memory, Ready
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.pieces.routing import Placement
from memkit.policy import Policy

__all__ = [
    "Chunk",
    "Fold",
    "SlotRules",
    "Slots",
    "contributions",
    "flat_slots",
    "memory_keys",
    "parameter_versions",
    "read_slots",
    "read_tokens",
]


@dataclass
class Chunk:
    """Tokens that leave the window together.

    keys [b, g, c, d] as they arrived; values [b, g, c, v], None in a plan; weights [b, g, c]; positions [b, 1, c];
    first: whether it is the row's first chunk, or a bool per row [b, 1, 1]; where: its timeline columns, one slice for
    all rows or numbers [b, c]; memory_keys [b, g, c, d]: what slots sum of the keys, None where not taken yet.
    """

    keys: Tensor
    values: Tensor | None
    weights: Tensor | None
    positions: Tensor | None
    first: bool | Tensor
    where: slice | Tensor
    memory_keys: Tensor | None = None


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

    @classmethod
    def of(cls, call: Call) -> SlotRules:
        """The rules of a call."""
        shape, dtype = call.keys.shape, call.keys.dtype
        return cls(call.policy, shape[-1], dtype, call.key_norm, call.rotation, call.values is not None)


@dataclass
class Fold:
    """What undoing one fold takes: kept where a backward pass will run through it.

    slot [b, g, c]: each token's slot, −1 where dropped; founders [b, g, c]: which of them founded, None for nobody;
    where, first: as in `Chunk`. sums, scalars: what the slots that were read anew held after the fold (those of the
    chunk's tokens, [b·g·c, …], or all, [b·g·m, …]); before: how they read before it, None where all slots were read
    anew (the sums that the fold before it left tell).
    """

    slot: Tensor
    founders: Tensor | None
    where: slice | Tensor
    first: bool | Tensor
    sums: Tensor
    scalars: Tensor
    before: tuple[Tensor | None, ...] | None


class Slots:
    """What slots sum, and how they read: sums [b, g, m, d + v], scalars [b, g, m, s], with room past the live ones.

    in_place: whether folding may write into these tensors, or makes new ones, so that autograd can follow.
    memory: the one whose tensors these were, which learns that they are written into.
    undo: every fold so far, where asked for (`keep_undo`).
    """

    def __init__(
        self,
        rules: SlotRules,
        sums: Tensor,
        scalars: Tensor,
        ready: Ready | None,
        in_place: bool,
        memory: Memory | None = None,
    ) -> None:
        self.rules, self.policy, self.in_place, self.memory = rules, rules.policy, in_place, memory
        self.sums, self.scalars = sums, scalars
        self._ready = ready
        self.undo: list[Fold] | None = None

    @property
    def ready(self) -> Ready:
        """The slots as they are read."""
        if self._ready is None:
            self._ready = read_slots(self.rules, self.sums, self.scalars)
        return self._ready

    @property
    def working_copy(self) -> Ready | None:
        """The slots as they are read, if that is at hand."""
        return self._ready

    def keep_undo(self) -> None:
        """Remember from now on what undoing each fold takes."""
        self.undo = []
        if self.policy.exact_slots:  # these are read where they stand; the undoing needs a copy of its own
            self._ready = Ready(self.ready.route, self.ready.keys.clone(), self.ready.values.clone(), None)

    def grow(self, room: int) -> None:
        """Make room for at least so many slots."""
        missing = room - self.sums.shape[2]
        if missing > 0:
            self.sums, self.scalars = (
                torch.cat((tensor, tensor.new_zeros(*tensor.shape[:2], missing, tensor.shape[-1])), dim=2)
                for tensor in (self.sums, self.scalars)
            )
            self._ready = None

    def fold(self, placement: Placement, chunk: Chunk) -> None:
        """Take a chunk in. Dropped tokens have slot −1."""
        if self.sums.shape[2] == 0:  # a budget of no slots at all
            return
        rows, scalars = contributions(self.rules, chunk, placement.founders)
        stored = placement.slot >= 0
        target = flat_slots(placement.slot, self.sums.shape[2])
        if self.policy.merging.additive or self.policy.exact_slots:
            if placement.drops:
                rows, scalars = (tensor.masked_fill(~stored.unsqueeze(-1), 0) for tensor in (rows, scalars))
            self._before_writing()
            self.sums, self.scalars = self._add(self.sums, target, rows), self._add(self.scalars, target, scalars)
        else:
            self._fold_in_turn(target.view(stored.shape), stored, placement.founded, rows, scalars)
        self._read_anew(placement, chunk, target)

    def _before_writing(self) -> None:
        if self.in_place and self.memory is not None:
            self.memory.written = True

    def _add(self, sums: Tensor, target: Tensor, rows: Tensor) -> Tensor:
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

    def _fold_in_turn(self, target: Tensor, stored: Tensor, founded: Tensor, rows: Tensor, scalars: Tensor) -> None:
        """A rule that is not additive: founders first, then token after token, over all rows and heads at once.

        The rule combines sums, mass, norms and positions alike; counts are added and radii kept, whatever the rule.
        """
        plain = torch.tensor([name in ("count", "radius") for name in self.policy.columns], device=target.device)
        width = self.sums.shape[-1]
        state = torch.cat((self.sums.to(self.scalars.dtype), self.scalars), dim=-1).flatten(0, 2)
        tokens = torch.cat((rows.to(scalars.dtype), scalars), dim=-1)
        # A token may join a slot whose founder stands behind it in the chunk.
        state = state.index_copy(0, target[founded], tokens[founded])
        joins = stored & ~founded
        for index in range(tokens.shape[2]):
            # Asked about these alone: on an empty slot a rule may divide by zero, and 0 · NaN spoils a gradient.
            some = joins[:, :, index]
            where, token = target[:, :, index][some], tokens[:, :, index][some]
            held = state[where]
            both = self.policy.merging.combine(held, token)
            both = torch.cat((both[:, :width], torch.where(plain, (held + token)[:, width:], both[:, width:])), dim=-1)
            state = state.index_copy(0, where, both)
        sums, numbers = state[:, :width].to(self.sums.dtype).view_as(self.sums), state[:, width:].view_as(self.scalars)
        if self.in_place:
            self._before_writing()
            self.sums.copy_(sums)
            self.scalars.copy_(numbers)
        else:
            self.sums, self.scalars = sums, numbers

    def _read_anew(self, placement: Placement, chunk: Chunk, target: Tensor) -> None:
        """Read the slots that a chunk has touched again: few of many, or simply all."""
        few = self.sums.shape[2] > placement.slot.shape[2]
        facts = (placement.slot, placement.founders, chunk.where, chunk.first)
        if not few:
            if self.undo is not None:
                sums, scalars = self.sums.flatten(0, 2).clone(), self.scalars.flatten(0, 2).clone()
                self.undo.append(Fold(*facts, sums, scalars, None))
            self._ready = None
            return
        if self.undo is None and (self._ready is None or not self.in_place or self.policy.exact_slots):
            self._ready = None
            return
        ready = self.ready
        sums, scalars = self.sums.flatten(0, 2)[target], self.scalars.flatten(0, 2)[target]
        fresh = read_slots(self.rules, sums, scalars)
        if self.undo is not None:
            read = (ready.keys, ready.values, ready.bias)
            before = tuple(None if tensor is None else tensor.flatten(0, 2)[target] for tensor in read)
            self.undo.append(Fold(*facts, sums, scalars, before))
        pairs = [(ready.keys, fresh.keys), (ready.values, fresh.values)]
        if ready.route is not ready.keys:
            pairs.append((ready.route, fresh.route))
        if ready.bias is not None and fresh.bias is not None:
            pairs.append((ready.bias, fresh.bias))
        for whole, part in pairs:
            whole.flatten(0, 2).index_copy_(0, target, part)


def flat_slots(slot: Tensor, room: int) -> Tensor:
    """Slot numbers [b, g, c] → rows of tensors seen as [b·g·m, …], m = `room`, flat; slot 0 for dropped tokens."""
    rows, heads = slot.shape[:2]
    base = torch.arange(rows * heads, device=slot.device).view(rows, heads, 1) * room
    return (slot.clamp(min=0) + base).flatten()


def memory_keys(rules: SlotRules, chunk: Chunk) -> Tensor:
    """What slots sum of a chunk's keys: [b, g, c, d], float32 or float64."""
    keys = chunk.keys.to(torch.promote_types(chunk.keys.dtype, torch.float32))
    if rules.policy.exact_slots:
        return keys
    keys = rules.policy.rotary.memory_keys(keys, rules.rotation, chunk.positions)
    return rules.policy.readout.key(keys, {}, rules.key_norm) if rules.policy.readout.layer_norm else keys


def contributions(rules: SlotRules, chunk: Chunk, founded: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token's row of sums [b, g, c, d + v] and of scalars [b, g, c, s], founders weighed as the rule says.

    founded [b, g, c]; None where no token founds.
    """
    policy, keys = rules.policy, memory_keys(rules, chunk) if chunk.memory_keys is None else chunk.memory_keys
    dtype, ones = keys.dtype, torch.ones_like(keys[..., 0])
    values = keys[..., :0] if chunk.values is None else chunk.values.to(dtype)
    for_keys = for_values = for_radius = ones
    weight = None if policy.exact_slots else policy.merging.weight(chunk.keys, chunk.weights)
    if weight is not None:
        weighs = policy.merging.weighs
        weight = weight.to(dtype)
        if founded is not None and not (weighs.founders and weighs.first_chunk):
            first = _tensor(chunk.first, founded)
            weighed = torch.where(first, _tensor(weighs.first_chunk, founded), _tensor(weighs.founders, founded))
            weight = torch.where(founded & ~weighed, 1, weight)
        for_keys, for_values = weight if weighs.keys else ones, weight if weighs.values else ones
        # In the first chunk the radius stays that of the plain value, even where its sums are weighed.
        for_radius = for_values if chunk.first is False else torch.where(_tensor(chunk.first, ones), 1, for_values)
    mass = for_values if policy.merging.weighs.values else for_keys
    columns: list[Tensor] = []
    for name in policy.columns:
        match name:
            case "count":
                column = ones
            case "mass":
                column = mass
            case "key_norm":
                column = keys.norm(dim=-1) * for_keys
            case "value_norm":
                column = values.norm(dim=-1) * for_values
            case "radius":
                column = torch.zeros_like(ones)
                if founded is not None:
                    column = torch.where(founded, values.norm(dim=-1) * for_radius, 0)
            case _:
                assert name == "position" and chunk.positions is not None
                column = chunk.positions * mass.double()
        columns.append(column.double())
    scalars = torch.stack(columns, dim=-1) if columns else keys.new_zeros(*ones.shape, 0, dtype=torch.float64)
    if for_keys is for_values:
        rows = torch.cat((keys, values), dim=-1)
        return rows if weight is None else rows * for_keys.unsqueeze(-1), scalars
    return torch.cat((keys * for_keys.unsqueeze(-1), values * for_values.unsqueeze(-1)), dim=-1), scalars


def read_slots(rules: SlotRules, sums: Tensor, scalars: Tensor) -> Ready:
    """Sums [..., d + v] and scalars [..., s] as they are read, on any leading axes."""
    policy, width, dtype = rules.policy, rules.width, rules.dtype
    keys, values = sums[..., :width], sums[..., width:]
    if policy.exact_slots:
        return Ready(keys, keys.to(dtype), values.to(dtype), None)
    numbers = scalars_by_name(policy, scalars)
    route = keys = policy.readout.key(keys, numbers, rules.key_norm)
    if policy.rotary.rotates_slots:
        mass = numbers["mass"]
        keys = policy.rotary.slot_keys(keys, rules.rotation, numbers["position"] / torch.where(mass > 0, mass, 1))
    if not rules.valued:
        return Ready(route, route, values, None)
    bias = policy.readout.bias(numbers)
    values = policy.readout.value(values, numbers)
    return Ready(route, keys.to(dtype), values.to(dtype), None if bias is None else bias.detach().to(dtype))


def read_tokens(rules: SlotRules, chunk: Chunk) -> Tensor:
    """The chunk's tokens as slots of their own would be read by routing, [b, g, c, d]."""
    everyone = torch.ones(chunk.keys.shape[:3], dtype=torch.bool, device=chunk.keys.device)
    rows, scalars = contributions(rules, chunk, everyone)
    numbers = scalars_by_name(rules.policy, scalars)
    return rules.policy.readout.key(rows[..., : chunk.keys.shape[-1]], numbers, rules.key_norm)


def parameter_versions(parameters: PolicyParameters | None) -> tuple[int, ...]:
    """What the slots as they are read depend on besides their sums: the learned tensors, as they are now."""
    if parameters is None:
        return ()
    # Tensors made in inference mode cannot change unseen, and have no version.
    versions = [(id(each), 0 if each.is_inference() else each._version) for each in parameters.tensors()]
    return tuple(number for pair in versions for number in pair)


def scalars_by_name(policy: Policy, scalars: Tensor) -> dict[str, Tensor]:
    """A slot's numbers by name; mass is the count where every token weighs 1."""
    named = dict(zip(policy.columns, scalars.unbind(-1), strict=True))
    if "mass" not in named:
        named["mass"] = named["count"]
    return named


def _tensor(condition: bool | Tensor, like: Tensor) -> Tensor:
    return condition if isinstance(condition, Tensor) else torch.full((), condition, device=like.device)
