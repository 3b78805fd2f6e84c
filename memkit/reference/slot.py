"""What a slot is: sums over tokens, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from memkit.pieces.statistics import MASS, Numbers
from memkit.reference.treatment import Treatment
from memkit.reference.words import direction, ratio, stacked

__all__ = ["Slot", "Token", "compared"]


@dataclass(frozen=True, eq=False)
class Slot:
    """Sums over tokens with weights w; a token alone is one too.

    key [d] = Σ w·k̄, value [v] = Σ w·v, count = Σ 1, mass = Σ w, key_norm = Σ w·‖k̄‖, value_norm = Σ w·‖v‖,
    position = Σ w·position; radius: ‖v‖ of the founder; founder_mass: w of the founder.
    """

    treatment: Treatment
    key: Tensor
    value: Tensor
    count: Tensor
    mass: Tensor
    radius: Tensor
    key_norm: Tensor
    value_norm: Tensor
    position: Tensor
    founder_mass: Tensor

    def plus(self, token: Slot) -> Slot:
        """The slot with one more token, or another slot. Its radius is its founder's for ever; where values alone are
        merged, so are its key and position."""
        both = self.treatment.policy.merging.of == "both"
        return replace(
            self,
            key=self.key + token.key if both else self.key,
            value=self.value + token.value,
            count=self.count + token.count,
            mass=self.mass + token.mass,
            key_norm=self.key_norm + token.key_norm if both else self.key_norm,
            value_norm=self.value_norm + token.value_norm,
            position=self.position + token.position if both else self.position,
        )

    def weighing(self, weight: Tensor) -> Slot:
        """The slot as if its mass were `weight`: everything that grows with weights, in proportion."""
        factor = weight / self.mass
        scaled = replace(
            self,
            value=self.value * factor,
            mass=weight,
            founder_mass=self.founder_mass * factor,
            value_norm=self.value_norm * factor,
        )
        if self.treatment.policy.merging.of == "values":
            return scaled
        return replace(scaled, key=self.key * factor, key_norm=self.key_norm * factor, position=self.position * factor)

    @property
    def key_mass(self) -> Tensor:
        """By what key and position are divided: the mass, or 1 where they are the founder's alone."""
        return self.mass if self.treatment.policy.merging.of == "both" else self.count.clamp(max=1)

    @property
    def numbers(self) -> Numbers:
        """What a user's readout is told of a slot, [1] each."""
        return {each: getattr(self, each.name)[None] for each in (*self.treatment.policy.statistics, MASS)}

    @cached_property
    def compared(self) -> Tensor:
        """The key as routing compares it: as it is read, but not rotated."""
        readout = self.treatment.policy.readout
        if readout.own:
            return readout.key(self.key[None], {**self.numbers, MASS: self.key_mass[None]}, self.treatment.norm)[0]
        match self.treatment.spec.readout.key:
            case "layer-norm":
                return self.treatment.layer_norm(self.key)
            case "l2":
                return direction(ratio(self.key, self.key_mass))
            case "mean-norm":
                return direction(ratio(self.key, self.key_mass)) * ratio(self.key_norm, self.key_mass)
            case "mean":
                return ratio(self.key, self.key_mass)

    @cached_property
    def met(self) -> Tensor:
        """The key as queries meet it."""
        match self.treatment.spec.rotary.kind:
            case "rerotate":
                return self.treatment.rotated(self.compared, ratio(self.position, self.key_mass), +1)
            case "keep" | "zero" | "unrotate":
                return self.compared
            case _:
                rotary, mean = self.treatment.policy.rotary, ratio(self.position, self.key_mass)[None, None, None]
                if not rotary.rotates_slots:
                    return self.compared
                return rotary.slot_keys(self.compared[None, None, None], self.treatment.rotation, mean)[0, 0, 0]

    @cached_property
    def answer(self) -> Tensor:
        """The value as it is read."""
        readout = self.treatment.policy.readout
        if readout.own:
            return readout.value(self.value[None], self.numbers)[0]
        match self.treatment.spec.readout.value:
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
        readout = self.treatment.policy.readout
        if readout.own:
            bias = readout.bias(self.numbers)
            return torch.zeros_like(self.count) if bias is None else bias[0]
        match self.treatment.spec.readout.bias:
            case "count" if self.count > 1:
                return self.count.log()
            case "mass" if self.founder_mass > 0:
                return (self.mass / self.founder_mass).log()
            case _:
                return torch.zeros_like(self.count)


@dataclass(frozen=True, eq=False)
class Token:
    """One token of one head. place: its rotary position, None where the policy un-rotates nothing; first: whether it is
    of the row's first chunk."""

    treatment: Treatment
    position: int
    key: Tensor
    value: Tensor
    weight: Tensor | None
    place: Tensor | None
    first: bool

    @cached_property
    def memory_key(self) -> Tensor:
        """k̄: the key after the rotary treatment, then after the LayerNorm where slots are read with one."""
        key, readout = self.treatment.treated(self.key, self.place), self.treatment.policy.readout
        if readout.own and readout.layer_norm:
            return readout.key(key[None], {}, self.treatment.norm)[0]
        return self.treatment.layer_norm(key) if self.treatment.spec.readout.key == "layer-norm" else key


def compared(slots: list[Slot], like: Tensor) -> Tensor:
    """Slots' keys as routing compares them, [m, d], without a gradient."""
    return stacked([slot.compared.detach() for slot in slots], like)
