"""Statistics: the numbers that a slot keeps besides its sums. Each is owned by the piece that reads it.

A token brings a number to its slot, and the slot sums them, in float64: at a million tokens float32 could no longer
tell a slot's mean position to within a turn of the fastest rotary pair. Where slots compete no position is summed, and
all are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "COUNT",
    "FOUNDER_MASS",
    "KEY_NORM",
    "MASS",
    "POSITION",
    "RADIUS",
    "VALUE_NORM",
    "Numbers",
    "Statistic",
    "Tokens",
]


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way into slots.

    keys [b, g, c, d]: memory keys; values [b, g, c, v], of no width where only a plan is made;
    founded [b, g, c], None where no token founds; positions [b, 1, c], None where nobody rotates;
    key_weight, value_weight [b, g, c]: what each token's key and value are multiplied by; radius_weight [b, g, c]:
    likewise for a founder's radius;
    mass [b, g, c]; key_mass [b, g, c]: by which keys and positions are divided.
    """

    keys: Tensor
    values: Tensor
    founded: Tensor | None
    positions: Tensor | None
    key_weight: Tensor
    value_weight: Tensor
    radius_weight: Tensor
    mass: Tensor
    key_mass: Tensor


class Statistic(ABC):
    """One number per slot, the sum of what its tokens bring."""

    name: ClassVar[str]
    by_rule: ClassVar[bool] = True
    """Whether a merge rule that is not additive combines it like the sums; else it is added, whatever the rule."""

    weighed: ClassVar[bool] = True
    """Whether it grows with its tokens' weights."""
    of_keys: ClassVar[bool] = False
    """Whether it says something of keys, so that it is the founder's alone where values alone are merged."""
    of_founder: ClassVar[bool] = False
    """Whether only a founder brings it."""

    @abstractmethod
    def of(self, tokens: Tokens) -> Tensor:
        """What each token brings, [b, g, c]."""

    def founders_own(self, of: str) -> bool:
        """Whether it stays as it is when a row joins, where `both` or `values` are merged."""
        return self.of_founder or (of == "values" and self.of_keys)

    def __repr__(self) -> str:
        return self.name


class _Count(Statistic):
    name = "count"
    by_rule = False
    weighed = False

    def of(self, tokens: Tokens) -> Tensor:
        return torch.ones_like(tokens.mass)


class _Mass(Statistic):
    name = "mass"

    def of(self, tokens: Tokens) -> Tensor:
        return tokens.mass


class _KeyNorm(Statistic):
    name = "key_norm"
    of_keys = True

    def of(self, tokens: Tokens) -> Tensor:
        return tokens.keys.norm(dim=-1) * tokens.key_weight


class _ValueNorm(Statistic):
    name = "value_norm"

    def of(self, tokens: Tokens) -> Tensor:
        return tokens.values.norm(dim=-1) * tokens.value_weight


class _Radius(Statistic):
    """The founder brings it, and it stays."""

    name = "radius"
    by_rule = False
    weighed = False
    of_founder = True

    def of(self, tokens: Tokens) -> Tensor:
        if tokens.founded is None:
            return torch.zeros_like(tokens.mass)
        return torch.where(tokens.founded, tokens.values.norm(dim=-1) * tokens.radius_weight, 0)


class _FounderMass(Statistic):
    """The founder's part of the mass."""

    name = "founder_mass"
    by_rule = False
    of_founder = True

    def of(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.mass) if tokens.founded is None else torch.where(tokens.founded, tokens.mass, 0)


class _Position(Statistic):
    name = "position"
    of_keys = True

    def of(self, tokens: Tokens) -> Tensor:
        assert tokens.positions is not None
        return tokens.positions * tokens.key_mass.double()


COUNT, MASS, POSITION = _Count(), _Mass(), _Position()
KEY_NORM, VALUE_NORM = _KeyNorm(), _ValueNorm()
RADIUS, FOUNDER_MASS = _Radius(), _FounderMass()
"""Tokens, Σ weight, Σ weight·position; Σ weight·‖k̄‖, Σ weight·‖v‖; the founder's ‖v‖, the founder's weight."""

Numbers = dict[Statistic, Tensor]
"""A slot's numbers, each [..., m], float64; the mass is the count where every token weighs 1."""
