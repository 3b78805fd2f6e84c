"""Slots: the store, and how it takes a chunk in.

FOLD is linear given the plan, hence parallel within a chunk and cheap to differentiate: an additive rule adds all rows
of a chunk at once; another rule takes them one after the other. What a row is, and how slots are read, is `rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.memory.rows import Chunk, SlotRules, SlotView, contributions, read_slots
from memkit.memory.window import Columns
from memkit.pieces.chunk import Assignment, begins
from memkit.policy import Policy

__all__ = ["Fold", "SlotStore", "flat_slots"]


BY_PRODUCT = {"cuda": (512, 2**26)}
"""Up to how many slots a chunk's rows are summed by a product with zeros and ones, and up to how many of these, per
kind of device, where products of float32 are exact. There sorting rows by slot is some twenty operations more."""


@dataclass
class Fold:
    """What undoing one fold takes: kept where a backward pass will run through it.

    target [b, g, c]: each token's slot among those of all rows and heads, any where it was dropped; dropped [b, g, c]:
    which were, None for none; founders [b, g, c]: which of them founded, None for nobody; where, first: as in `Chunk`.
    sums, numbers: what the slots that were read anew held after the fold (those of the chunk's tokens, [b·g·c, …], or
    all, [b·g·m, …]); before: how they read before it, None where all slots were read anew (the sums that the fold
    before it left tell).
    """

    target: Tensor
    dropped: Tensor | None
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
    float64, or of the sums' dtype where the policy replaces slots; view: how they are read, where that is at hand;
    evidence [b, g, M, e]: what observed queries have told of them (see `pieces.evidence`), None where none are
    observed; founders_keys [b, g, M, d]: how queries meet their keys, where these are their founders' and known;
    lines [b, g, M, …]: what all of these are views of, side by side, where a fold has made them anew (see `replacing`).
    in_place: whether adding may write into these tensors, or makes new ones, so that autograd can follow.
    undo: every fold so far, where asked for. before_writing: called before tensors are changed in place.
    """

    sums: Tensor
    numbers: Tensor
    view: SlotView | None = None
    evidence: Tensor | None = None
    in_place: bool = True
    undo: list[Fold] | None = None
    founders_keys: Tensor | None = None
    before_writing: Callable[[], None] | None = None
    lines: Tensor | None = None

    @classmethod
    def empty(cls, policy: Policy, shape: tuple[int, int, int, int], like: Tensor, in_place: bool) -> SlotStore:
        """Room [b, g, M, d + v] with no slot in it, for tokens like these."""
        sums = like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
        dtype = sums.dtype if policy.replaces else torch.float64
        numbers = like.new_zeros(*shape[:3], len(policy.statistics), dtype=dtype)
        evidence = sums.new_zeros(*shape[:3], policy.observation.numbers) if policy.observes else None
        return cls(sums, numbers, evidence=evidence, in_place=in_place)

    @property
    def room(self) -> int:
        """Slots there is room for."""
        return self.sums.shape[2]

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow into it."""
        return self.sums.requires_grad or self.numbers.requires_grad

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
            self.view = read_slots(rules, self.sums, self.numbers, self.founders_keys)
        return self.view

    def compact(self) -> SlotStore:
        """A store with nothing but what must be kept, in tensors of its own."""
        evidence = None if self.evidence is None else self.evidence.contiguous()
        return SlotStore(self.sums.contiguous(), self.numbers.contiguous(), evidence=evidence)

    def grow(self, room: int) -> None:
        """Make room for at least so many slots."""
        missing = room - self.room
        if missing > 0:
            self.sums, self.numbers = _longer(self.sums, missing), _longer(self.numbers, missing)
            self.evidence = None if self.evidence is None else _longer(self.evidence, missing)
            self.view = self.founders_keys = self.lines = None

    def take_lines(
        self, lines: Tensor, sums: int, numbers: slice, evidence: slice, founders_keys: slice | None
    ) -> None:
        """Have these slots instead, [b, g, M, …]: sums in so many columns first, and the others where they are said."""
        self.sums, self.numbers = lines[..., :sums], lines[..., numbers]
        self.founders_keys = None if founders_keys is None else lines[..., founders_keys]
        self.evidence = lines[..., evidence] if self.evidence is not None else None
        self.lines, self.view = lines, None
        if self.evidence is not None and torch.is_grad_enabled():  # written into later, and carries no gradient
            self.evidence, self.lines = self.evidence.detach().clone(), None

    def add(self, rules: SlotRules, assignment: Assignment, chunk: Chunk) -> None:
        """FOLD: take a chunk in. Dropped tokens have slot −1."""
        if self.room == 0:  # a budget of no slots at all
            return
        rows, numbers = contributions(rules, chunk, assignment.founders)
        target = flat_slots(assignment.slot, self.room)
        dropped = assignment.slot < 0 if assignment.drops else None
        if rules.policy.merging.additive:
            if dropped is not None:
                rows, numbers = (tensor.masked_fill(dropped.unsqueeze(-1), 0) for tensor in (rows, numbers))
            self.about_to_write()
            takes = self._takes(assignment.slot)
            self.sums = self._added(self.sums, target, takes, rows)
            if rules.valued or not rules.policy.readout.layer_norm:  # a plan reads such slots' keys by their sums alone
                self.numbers = self._added(self.numbers, target, takes, numbers)
        else:
            self._add_in_turn(rules, target.view(rows.shape[:3]), dropped, assignment.founded, rows, numbers)
        self._read_anew(rules, assignment, chunk, target, dropped)

    def hold(self, sums: Tensor, numbers: Tensor) -> None:
        """Have the first slots hold this instead, [b, g, m, …]."""
        self.about_to_write()
        self.sums[:, :, : sums.shape[2]] = sums
        self.numbers[:, :, : numbers.shape[2]] = numbers
        self.view = None

    def about_to_write(self) -> None:
        """To be called before these tensors, or those of the window beside them, are changed in place."""
        if self.in_place and self.before_writing is not None:
            self.before_writing()

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
        self.view = self.founders_keys = self.lines = None

    def _takes(self, slot: Tensor) -> Tensor | None:
        """Whether each slot takes each token, [b, g, M, c]; None where rows are not summed by a product."""
        most, numbers = BY_PRODUCT.get(slot.device.type, (0, 0))
        if self.room > most or slot.numel() * self.room > numbers or not _products_are_exact():
            return None
        return slot.unsqueeze(-2) == torch.arange(self.room, device=slot.device).unsqueeze(-1)

    def _added(self, sums: Tensor, target: Tensor, takes: Tensor | None, rows: Tensor) -> Tensor:
        rows = rows.to(sums.dtype)
        if takes is not None:
            added = takes.to(sums.dtype) @ rows
            return sums.add_(added) if self.in_place else sums + added
        flat, rows = sums.flatten(0, 2), rows.flatten(0, 2)
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
        self, rules: SlotRules, target: Tensor, dropped: Tensor | None, founded: Tensor, rows: Tensor, numbers: Tensor
    ) -> None:
        """A rule that is not additive: founders first, then token after token, over all rows and heads at once."""
        statistics, combine = rules.policy.statistics, rules.policy.merging.combine
        added = torch.tensor([not statistic.by_rule for statistic in statistics], device=target.device)
        width = self.sums.shape[-1]
        state = torch.cat((self.sums.to(self.numbers.dtype), self.numbers), dim=-1).flatten(0, 2)
        tokens = torch.cat((rows.to(numbers.dtype), numbers), dim=-1)
        # A token may join a slot whose founder stands behind it in the chunk.
        state = state.index_copy(0, target[founded], tokens[founded])
        joins = ~founded if dropped is None else ~(founded | dropped)
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

    def _read_anew(
        self, rules: SlotRules, assignment: Assignment, chunk: Chunk, target: Tensor, dropped: Tensor | None
    ) -> None:
        """Read the slots that a chunk has touched again: few of many, or simply all."""
        most = assignment.slot.shape[2]
        if self.undo is not None:  # a backward pass wants all of a call's folds alike
            most = max(most, rules.policy.chunk)
        few = self.room > most
        facts = (target.view(assignment.slot.shape), dropped, assignment.founders, chunk.where, chunk.first)
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
        sums, numbers = (each.flatten(0, 2).index_select(0, target) for each in (self.sums, self.numbers))
        fresh = read_slots(rules, sums, numbers)
        if self.undo is not None:
            read = (view.keys, view.values, view.bias)
            before = tuple(None if each is None else each.flatten(0, 2).index_select(0, target) for each in read)
            self.undo.append(Fold(*facts, sums, numbers, before))
        pairs = [(view.keys, fresh.keys), (view.values, fresh.values)]
        if view.route is not view.keys:
            pairs.append((view.route, fresh.route))
        if view.bias is not None and fresh.bias is not None:
            pairs.append((view.bias, fresh.bias))
        for whole, part in pairs:
            whole.flatten(0, 2).index_copy_(0, target, part)


def _products_are_exact() -> bool:
    """Whether a GPU multiplies float32 as such, and not rounded to TF32."""
    of_products = torch.backends.cuda.matmul.fp32_precision
    of_all: str = torch.backends.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return (of_all if of_products == "none" else of_products) in ("none", "ieee")


def _longer(tensor: Tensor, missing: int) -> Tensor:
    """[b, g, M, s] with room for so many more."""
    return torch.cat((tensor, tensor.new_zeros(*tensor.shape[:2], missing, tensor.shape[-1])), dim=2)


def flat_slots(slot: Tensor, room: int) -> Tensor:
    """Slot numbers [b, g, c] → rows of tensors seen as [b·g·m, …], m = `room`, flat; slot 0 for dropped tokens."""
    return (slot.clamp(min=0) + begins(slot, room)).flatten()
