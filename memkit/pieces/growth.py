"""Growth: how many slots there may be after n tokens.

budget(n) = min(cap, max(floor, ⌊f(n)⌋ rounded down to a multiple of `round_down`)); a policy adds that it is at least
the sinks, at most the tokens absorbed, and never shrinks. Which n is meant is the spec's `counts`.
"""

from __future__ import annotations

import functools
import math
import numbers
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from memkit.errors import PolicyError, shown
from memkit.pieces.registry import FamilySpec, register
from memkit.whole import MOST

__all__ = [
    "SNAP",
    "AnyGrowthSpec",
    "FixedGrowthSpec",
    "Growth",
    "GrowthSpec",
    "LinearGrowthSpec",
    "LogGrowthSpec",
    "NoGrowthSpec",
    "PowerGrowthSpec",
    "SaturatingGrowthSpec",
    "SqrtGrowthSpec",
]

SNAP = 1 + 2.0**-49
"""Float formulas whose exact value is a whole number may land a few units in the last place below it, as 64 ** (1/3)
does: times this they are lifted back before they are rounded down."""


class Growth(ABC):
    """A growth schedule. Pure: the same n gives the same budget."""

    def __init__(self, spec: GrowthSpec) -> None:
        self.spec = spec

    @abstractmethod
    def size(self, tokens: int) -> float:
        """f(n), the unrounded number of slots after n tokens; finite and never falling.

        A power or logarithm of floats is taken times `SNAP`.
        """

    def budget(self, tokens: int) -> int:
        """Slots allowed after n `tokens`, n ≥ 0. Raises `PolicyError` where f(n) is not a finite number."""
        size = self.size(tokens)
        # A whole number is finite whatever its size, and `isfinite` takes none beyond the floats.
        if not isinstance(size, numbers.Rational) and not (isinstance(size, numbers.Real) and math.isfinite(size)):
            raise PolicyError(
                f"growth '{self.spec.kind}': a budget must be a finite number, got {shown(size)} after {tokens} tokens"
            )
        rounded = math.floor(size) // self.spec.round_down * self.spec.round_down
        budget = max(self.spec.floor, rounded)
        return budget if self.spec.cap is None else min(self.spec.cap, budget)


class AnyGrowthSpec(FamilySpec):
    """Declares a growth schedule, or that there is none."""

    family: ClassVar[str] = "growth"

    @abstractmethod
    def build(self) -> Growth | None:
        """The schedule; None where there are never slots but sinks."""


class GrowthSpec(AnyGrowthSpec):
    """Declares a growth schedule, with the bounds that every schedule has."""

    floor: int = Field(default=0, ge=0, le=MOST, description="slots allowed at least")
    cap: int | None = Field(
        default=None, ge=0, le=MOST, description="slots allowed at most, included; left out: no cap"
    )
    round_down: int = Field(
        default=1, ge=1, le=MOST, description="f(n) is rounded down to a multiple of this many slots"
    )
    counts: Literal["seen", "absorbed"] = Field(
        default="seen",
        description="which n: tokens seen, the window included (n = b + W·C when the chunk at b leaves), "
        "or tokens absorbed (n = b + C)",
    )
    first_chunk: Literal["budget", "whole"] = Field(
        default="budget",
        description="whether the first chunk founds as many slots as the budget grants, or one per token",
    )

    @model_validator(mode="after")
    def _ordered(self) -> GrowthSpec:
        if self.cap is not None and self.cap < self.floor:
            raise ValueError(f"floor must not exceed cap, got floor {self.floor} and cap {self.cap}; lower the floor")
        return self

    @abstractmethod
    def build(self) -> Growth:
        """The schedule."""


@register
class NoGrowthSpec(AnyGrowthSpec):
    """No slots but the sinks, which stay exact tokens at their own positions; all others are dropped."""

    kind: Literal["none"] = "none"

    def build(self) -> None:
        return None


@register
class FixedGrowthSpec(GrowthSpec):
    """A constant number of slots."""

    kind: Literal["fixed"] = "fixed"
    slots: int = Field(ge=0, le=MOST, description="slots, sinks included")

    def build(self) -> Fixed:
        return Fixed(self)


class Fixed(Growth):
    """f(n) = slots."""

    spec: FixedGrowthSpec

    def size(self, tokens: int) -> int:
        return self.spec.slots


@register
class SqrtGrowthSpec(GrowthSpec):
    """Slots grow with the square root of the tokens; prefill costs O(N^1.5) (arXiv 2605.09877, "KVM sqrt")."""

    kind: Literal["sqrt"] = "sqrt"
    factor: float = Field(gt=0, le=MOST, description="slots per √token")

    def build(self) -> Sqrt:
        return Sqrt(self)


class Sqrt(Growth):
    """f(n) = factor·√n, floored exactly: ⌊a√n⌋ = isqrt(⌊a²n⌋)."""

    spec: SqrtGrowthSpec

    def size(self, tokens: int) -> int:
        factor = _decimal(self.spec.factor)
        return math.isqrt(factor.numerator**2 * tokens // factor.denominator**2)


@register
class PowerGrowthSpec(GrowthSpec):
    """Slots grow with a power of the tokens; prefill costs O(N^(1 + exponent))."""

    kind: Literal["power"] = "power"
    factor: float = Field(gt=0, le=MOST, description="slots after the first token")
    exponent: float = Field(ge=0, le=1, description="power of the number of tokens, 0 and 1 included")

    def build(self) -> Power:
        return Power(self)


class Power(Growth):
    """f(n) = factor·n^exponent."""

    spec: PowerGrowthSpec

    def size(self, tokens: int) -> float:
        return self.spec.factor * tokens**self.spec.exponent * SNAP


@register
class LogGrowthSpec(GrowthSpec):
    """Slots grow with the logarithm of the tokens; prefill costs O(N log N)."""

    kind: Literal["log"] = "log"
    per_doubling: float = Field(gt=0, le=MOST, description="slots added each time 1 + n/start doubles")
    start: float = Field(ge=1e-12, le=MOST, description="tokens after which the first doubling is complete")

    def build(self) -> Log:
        return Log(self)


class Log(Growth):
    """f(n) = per_doubling · log₂(1 + n/start)."""

    spec: LogGrowthSpec

    def size(self, tokens: int) -> float:
        return self.spec.per_doubling * math.log2(1 + tokens / self.spec.start) * SNAP


@register
class SaturatingGrowthSpec(GrowthSpec):
    """Slots grow towards a limit (arXiv 2602.03922, and KVM's saturating budget)."""

    kind: Literal["saturating"] = "saturating"
    limit: int = Field(
        ge=1, le=MOST, description="slots approached as the tokens go to infinity; half of it after `limit` tokens"
    )

    def build(self) -> Saturating:
        return Saturating(self)


class Saturating(Growth):
    """f(n) = limit·n / (limit + n), floored exactly."""

    spec: SaturatingGrowthSpec

    def size(self, tokens: int) -> int:
        return self.spec.limit * tokens // (self.spec.limit + tokens)


@register
class LinearGrowthSpec(GrowthSpec):
    """A fixed share of the tokens; prefill costs O(N²)."""

    kind: Literal["linear"] = "linear"
    fraction: float = Field(gt=0, le=1, description="slots per token, 1 included")

    def build(self) -> Linear:
        return Linear(self)


class Linear(Growth):
    """f(n) = fraction·n, floored exactly for the fraction as written in decimals."""

    spec: LinearGrowthSpec

    def size(self, tokens: int) -> int:
        fraction = _decimal(self.spec.fraction)
        return fraction.numerator * tokens // fraction.denominator


@functools.cache
def _decimal(number: float) -> Fraction:
    """The number as a person wrote it: 0.1 is one tenth, not its nearest binary fraction."""
    return Fraction(repr(number))
