"""Statistics: the numbers that a slot keeps besides its sums. Each is owned by the piece that reads it.

A token brings a number to its slot, and the slot sums them. All are float64: at a million tokens float32 could no
longer tell a slot's mean position to within a turn of the fastest rotary pair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["COUNT", "KEY_NORM", "MASS", "POSITION", "RADIUS", "VALUE_NORM", "Numbers", "Statistic", "Tokens"]


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way into slots.

    keys [b, g, c, d]: memory keys; values [b, g, c, v], of no width where only a plan is made; founded [b, g, c], None
    where no token founds; positions [b, 1, c], None where nobody rotates; key_weight, value_weight [b, g, c]: what each
    token's key and value are multiplied by; radius_weight [b, g, c]: likewise for a founder's radius; mass [b, g, c].
    """

    keys: Tensor
    values: Tensor
    founded: Tensor | None
    positions: Tensor | None
    key_weight: Tensor
    value_weight: Tensor
    radius_weight: Tensor
    mass: Tensor


class Statistic(ABC):
    """One number per slot, the sum of what its tokens bring."""

    name: ClassVar[str]
    by_rule: ClassVar[bool] = True
    """Whether a merge rule that is not additive combines it like the sums; else it is added, whatever the rule."""

    @abstractmethod
    def of(self, tokens: Tokens) -> Tensor:
        """What each token brings, [b, g, c]."""

    def __repr__(self) -> str:
        return self.name


class _Count(Statistic):
    name = "count"
    by_rule = False

    def of(self, tokens: Tokens) -> Tensor:
        return torch.ones_like(tokens.mass)


class _Mass(Statistic):
    name = "mass"

    def of(self, tokens: Tokens) -> Tensor:
        return tokens.mass


class _KeyNorm(Statistic):
    name = "key_norm"

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

    def of(self, tokens: Tokens) -> Tensor:
        if tokens.founded is None:
            return torch.zeros_like(tokens.mass)
        return torch.where(tokens.founded, tokens.values.norm(dim=-1) * tokens.radius_weight, 0)


class _Position(Statistic):
    name = "position"

    def of(self, tokens: Tokens) -> Tensor:
        assert tokens.positions is not None
        return tokens.positions * tokens.mass.double()


COUNT, MASS, KEY_NORM, VALUE_NORM, RADIUS, POSITION = (
    _Count(),
    _Mass(),
    _KeyNorm(),
    _ValueNorm(),
    _Radius(),
    _Position(),
)
"""Tokens, Σ weight, Σ weight·position; Σ weight·‖k̄‖, Σ weight·‖v‖, the founder's ‖v‖."""

Numbers = dict[Statistic, Tensor]
"""A slot's numbers, each [..., m], float64; the mass is the count where every token weighs 1."""
