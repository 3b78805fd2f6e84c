"""What a slot is: sums over tokens, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from memkit.reference.treatment import Treatment
from memkit.reference.words import direction, ratio, stacked

__all__ = ["Slot", "Token", "compared"]


@dataclass(frozen=True, eq=False)
class Slot:
    """Sums over tokens with weights w; a token alone is one too.

    key [d] = Σ w·k̄, value [v] = Σ w·v, count = Σ 1, mass = Σ w, key_norm = Σ w·‖k̄‖, value_norm = Σ w·‖v‖,
    position = Σ w·position; radius: ‖v‖ of the founder.
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

    def plus(self, token: Slot) -> Slot:
        """The slot with one more token. Its radius is its founder's for ever."""
        return Slot(
            treatment=self.treatment,
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
        match self.treatment.spec.readout.key:
            case "layer-norm":
                return self.treatment.layer_norm(self.key)
            case "l2":
                return direction(ratio(self.key, self.mass))
            case "mean-norm":
                return direction(ratio(self.key, self.mass)) * ratio(self.key_norm, self.mass)
            case "mean":
                return ratio(self.key, self.mass)

    @cached_property
    def met(self) -> Tensor:
        """The key as queries meet it."""
        match self.treatment.spec.rotary.kind:
            case "rerotate":
                return self.treatment.rotated(self.compared, ratio(self.position, self.mass), +1)
            case "keep" | "zero" | "unrotate":
                return self.compared
            case _:
                rotary, mean = self.treatment.policy.rotary, ratio(self.position, self.mass)[None, None, None]
                if not rotary.rotates_slots:
                    return self.compared
                return rotary.slot_keys(self.compared[None, None, None], self.treatment.rotation, mean)[0, 0, 0]

    @cached_property
    def answer(self) -> Tensor:
        """The value as it is read."""
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
        counted = self.treatment.spec.readout.count_bias and self.count > 1
        return self.count.log() if counted else torch.zeros_like(self.count)


@dataclass(frozen=True, eq=False)
class Token:
    """One token of one head. place: its rotary position, None where the policy un-rotates nothing."""

    treatment: Treatment
    position: int
    key: Tensor
    value: Tensor
    weight: Tensor | None
    place: Tensor | None

    @cached_property
    def memory_key(self) -> Tensor:
        """k̄: the key after the rotary treatment, then after the LayerNorm where slots are read with one."""
        key = self.treatment.treated(self.key, self.place)
        return self.treatment.layer_norm(key) if self.treatment.spec.readout.key == "layer-norm" else key


def compared(slots: list[Slot], like: Tensor) -> Tensor:
    """Slots' keys as routing compares them, [m, d], without a gradient."""
    return stacked([slot.compared.detach() for slot in slots], like)
