"""Slots between two calls, held once: as they are read, with what the next fold needs besides.

All readouts but the LayerNorm of keys stretch a slot's sums: what is read, times a number per slot, is the sum. That
number is the mass or the count of a mean; another readout's is kept. In half precision four more bits of each number
tell what rounding took from it, unless it is one token's own and nothing was. What a LayerNorm is read from is
kept as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.memory.rows import SlotRules, SlotView, by_statistic, key_mass, mean_position
from memkit.memory.slots import SlotStore
from memkit.pieces.statistics import COUNT, Numbers

__all__ = ["HeldSlots"]


@dataclass
class HeldSlots:
    """Slots at rest. Copies, reorders and files of a memory go through `mapped`, `tensors` and `sums`.

    keys [b, g, M, d], values [b, g, M, v]: as queries meet them, in the window's dtype, be it at the front of the
    buffer that decoding reads; key_sums [b, g, M, d]: where the keys do not tell them, else None;
    key_stretch, value_stretch [b, g, M]: sums over what is read, None where numbers tell; key_rest, value_rest
    [b, g, M, ⌈d/2⌉], int8: what rounding took, None where that is nothing; numbers [b, g, M, s], evidence [b, g, M, e]:
    as in `SlotStore`; rules: of the call that read them; made_with: the versions of the parameters that they were read
    with; scaled: whether the keys have been multiplied by query scales, and cannot be read again.
    """

    rules: SlotRules
    keys: Tensor
    values: Tensor
    key_sums: Tensor | None
    key_stretch: Tensor | None
    value_stretch: Tensor | None
    key_rest: Tensor | None
    value_rest: Tensor | None
    numbers: Tensor
    evidence: Tensor | None
    made_with: tuple[int, ...] = ()
    scaled: bool = False

    @classmethod
    def of(cls, rules: SlotRules, store: SlotStore, slots: int, made_with: tuple[int, ...]) -> HeldSlots:
        """The first slots of a call's store, in tensors of their own."""
        policy, width = rules.policy, rules.width
        sums, numbers = store.sums[:, :, :slots], store.numbers[:, :, :slots]
        view = store.read(rules).first(slots)
        named = by_statistic(policy, numbers)
        key_sums, value_sums = sums[..., :width], sums[..., width:]
        keeps_sums = policy.readout.layer_norm or policy.readout.spec.temperatures or not policy.rotary.reversible
        rotation = rules.rotation
        if rotation is not None:  # the positions of that call's tokens are not the slots'
            rotation = dataclasses.replace(rotation, positions=None)
        held = cls(
            rules=dataclasses.replace(rules, rotation=rotation, key_norm=None),
            keys=view.keys.contiguous(),
            values=view.values.contiguous(),
            key_sums=key_sums.contiguous() if keeps_sums else None,
            key_stretch=None if keeps_sums or _key_mass(rules, named) is not None else _stretch(key_sums, view.route),
            value_stretch=None,
            key_rest=None,
            value_rest=None,
            numbers=numbers.contiguous(),
            evidence=None if store.evidence is None else store.evidence[:, :, :slots].contiguous(),
            made_with=made_with,
        )
        known = rules.policy.readout.value_mass(named)
        if known is None or (policy.merging.joins and view.values.dtype != sums.dtype):
            values = policy.readout.value(value_sums, named)
            held.value_stretch = _stretch(value_sums, values) if known is None else None
            if policy.merging.joins and view.values.dtype != sums.dtype:
                held.value_rest = policy.storage.rest(values, view.values, named[COUNT])
        known_exactly = policy.keeps_keys and (policy.rotary.rotates_slots or not policy.rotary.rounds)
        if not (keeps_sums or known_exactly) and view.keys.dtype != sums.dtype:
            keys = view.route
            if policy.rotary.rotates_slots:
                assert rotation is not None
                keys = policy.rotary.slot_keys(keys, rotation, mean_position(policy, named))
            held.key_rest = policy.storage.rest(keys, view.keys, named[COUNT])
        return held

    @property
    def sums(self) -> Tensor:
        """What slots sum of keys and values, [b, g, M, d + v], float32 or float64."""
        numbers = by_statistic(self.rules.policy, self.numbers)
        wide, whole = torch.promote_types(self.keys.dtype, torch.float32), self.rules.policy.storage.whole
        keys = self.key_sums
        if keys is None:
            keys = whole(self.keys, self.key_rest, wide)
            if self.rules.policy.rotary.rotates_slots:
                assert self.rules.rotation is not None
                keys = self.rules.rotation.apply(keys, mean_position(self.rules.policy, numbers), inverse=True)
            if not self.rules.policy.keeps_keys:
                keys = keys * _either(self.key_stretch, _key_mass(self.rules, numbers)).to(wide).unsqueeze(-1)
        values = whole(self.values, self.value_rest, wide)
        stretch = _either(self.value_stretch, self.rules.policy.readout.value_mass(numbers))
        return torch.cat((keys, values * stretch.to(wide).unsqueeze(-1)), dim=-1)

    @property
    def view(self) -> SlotView:
        """How they are read."""
        bias = self.rules.policy.readout.bias(by_statistic(self.rules.policy, self.numbers))
        bias = None if bias is None else bias.to(self.keys.dtype)
        return SlotView(self.keys, self.keys, self.values, bias, self.made_with)

    @property
    def room(self) -> int:
        """Slots there are."""
        return self.keys.shape[2]

    @property
    def requires_grad(self) -> bool:
        """Never: a memory with a history keeps its sums."""
        return False

    def reads(self, made_with: tuple[int, ...]) -> bool:
        """Whether `view` is how calls with these parameters read them."""
        return not self.scaled and (self.key_sums is None or self.made_with == made_with)

    def opened(self) -> SlotStore:
        """The store of a call that folds a chunk in."""
        sums, policy = self.sums, self.rules.policy
        founders_keys = self.keys.to(sums.dtype) if policy.keeps_keys and policy.rotary.rotates_slots else None
        return SlotStore(sums, self.numbers, evidence=self.evidence, founders_keys=founders_keys)

    def as_read(self) -> SlotStore:
        """The store of a call that reads slots and folds nothing in: there are no sums in it."""
        return SlotStore(self.values[..., :0], self.numbers, view=self.view, evidence=self.evidence)

    def standing_at(self, keys: Tensor, values: Tensor, scaled: bool = False) -> HeldSlots:
        """The same slots, as decoding has written them, as they are read, at the front of its buffer.

        keys [b, g, M, d], values [b, g, M, v]: views of the buffer; scaled: whether the keys were multiplied by query
        scales.
        """
        return dataclasses.replace(self, keys=keys, values=values, scaled=scaled)

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        return [each for each in vars(self).values() if isinstance(each, Tensor)]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> HeldSlots:
        """Held slots of changed tensors."""
        changed = {name: change(each) for name, each in vars(self).items() if isinstance(each, Tensor)}
        return dataclasses.replace(self, **changed)


def _key_mass(rules: SlotRules, numbers: Numbers) -> Tensor | None:
    """What key sums are over keys as read, where the readout's mean tells."""
    return key_mass(rules.policy, numbers) if rules.policy.readout.means_keys else None


def _either(kept: Tensor | None, told: Tensor | None) -> Tensor:
    either = told if kept is None else kept
    assert either is not None
    return either


def _stretch(sums: Tensor, read: Tensor) -> Tensor:
    """How many times as long sums [..., m, d] are as what is read of them, [..., m]."""
    length = read.norm(dim=-1)
    return torch.where(length > 0, sums.norm(dim=-1) / torch.where(length > 0, length, 1), 0)
