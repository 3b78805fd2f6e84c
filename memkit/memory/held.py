"""Slots between two calls, as they are read, where that tells what they sum: nothing is held twice.

Where a slot's key is its founder's and its value is read as a mean (`Policy.holds_what_is_read`), the key sum is that
key with its rotation undone, and the value sum is the mean times the mass. In half precision a second half keeps what
rounding took off the mean, unless a slot holds one token alone and nothing was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.memory.rows import SlotRules, SlotView, by_statistic
from memkit.memory.slots import SlotStore
from memkit.pieces.statistics import MASS, POSITION

__all__ = ["HeldSlots"]


@dataclass
class HeldSlots:
    """Slots at rest.

    keys [b, g, M, d], values [b, g, M, v]: as queries meet them, in the window's dtype, be it at the front of the
    buffer that decoding reads; rest [b, g, M, v]: what the values lack of the mean, None where that is nothing;
    numbers [b, g, M, s], evidence [b, g, M, 3]: as in `SlotStore`; rules: of the call that read them.
    """

    rules: SlotRules
    keys: Tensor
    values: Tensor
    rest: Tensor | None
    numbers: Tensor
    evidence: Tensor | None

    @classmethod
    def of(cls, rules: SlotRules, store: SlotStore) -> HeldSlots:
        """What a call leaves in its store, in tensors of its own."""
        policy, view = rules.policy, store.read(rules)
        rest = None
        if policy.merging.joins and view.values.dtype != store.sums.dtype:
            mean = policy.readout.value(store.sums[..., rules.width :], by_statistic(policy, store.numbers))
            rest = (mean - view.values).to(view.values.dtype)
        rotation = rules.rotation
        if rotation is not None:  # the positions of that call's tokens are not the slots'
            rotation = dataclasses.replace(rotation, positions=None)
        return cls(
            dataclasses.replace(rules, rotation=rotation, key_norm=None),
            view.keys.contiguous(),
            view.values,
            rest,
            store.numbers.contiguous(),
            None if store.evidence is None else store.evidence.contiguous(),
        )

    @property
    def sums(self) -> Tensor:
        """What slots sum of keys and values, [b, g, M, d + v], float32 or float64."""
        policy, numbers = self.rules.policy, by_statistic(self.rules.policy, self.numbers)
        wide = torch.promote_types(self.keys.dtype, torch.float32)
        keys, values = self.keys.to(wide), self.values.to(wide)
        if policy.rotary.rotates_slots:
            assert self.rules.rotation is not None
            keys = self.rules.rotation.apply(keys, numbers[POSITION], inverse=True)
        if self.rest is not None:
            values = values + self.rest
        return torch.cat((keys, values * numbers[MASS].to(wide).unsqueeze(-1)), dim=-1)

    @property
    def view(self) -> SlotView:
        """How they are read."""
        bias = self.rules.policy.readout.bias(by_statistic(self.rules.policy, self.numbers))
        return SlotView(self.keys, self.keys, self.values, None if bias is None else bias.to(self.keys.dtype))

    @property
    def room(self) -> int:
        """Slots there are."""
        return self.keys.shape[2]

    @property
    def requires_grad(self) -> bool:
        """Never: a memory with a history keeps its sums."""
        return False

    def opened(self) -> SlotStore:
        """The store of a call that takes the memory over."""
        sums = self.sums
        founders_keys = self.keys.to(sums.dtype) if self.rules.policy.rotary.rotates_slots else None
        return SlotStore(sums, self.numbers, evidence=self.evidence, founders_keys=founders_keys)

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        rest = [tensor for tensor in (self.rest, self.evidence) if tensor is not None]
        return [self.keys, self.values, self.numbers, *rest]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> HeldSlots:
        """Held slots of changed tensors."""
        rest = None if self.rest is None else change(self.rest)
        evidence = None if self.evidence is None else change(self.evidence)
        return HeldSlots(self.rules, change(self.keys), change(self.values), rest, change(self.numbers), evidence)

    def put_into(self, keys: Tensor, values: Tensor) -> None:
        """Hold keys and values at the front of these buffers [b, g, n ≥ M, …] from now on."""
        for name, buffer in (("keys", keys), ("values", values)):
            front = buffer.narrow(2, 0, self.room)
            front.copy_(getattr(self, name))
            setattr(self, name, front)
