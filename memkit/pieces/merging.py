"""Merging: how a slot takes a token.

What a slot holds is a row of sums over its tokens: weight·key, weight·value, the weight itself (mass), and what the
readout needs besides. An additive rule says only how much a token weighs; a rule that is not additive says what a
slot's row becomes when a token's row arrives, one token after another.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from memkit.pieces.needs import Need
from memkit.pieces.registry import FamilySpec, Spec, register

__all__ = ["DropSpec", "MeanSpec", "Merging", "MergingSpec", "Weigh", "WeightedMeanSpec"]


Of = Literal["both", "values"]


class Weigh(Spec):
    """Where a token's weight counts; elsewhere its weight is 1."""

    keys: bool = Field(default=True, description="in the key sum")
    values: bool = Field(default=True, description="in the value sum")
    founders: bool = Field(default=False, description="also for tokens that found a slot")
    first_chunk: bool = Field(
        default=False, description="also for founders of the first chunk (whose radius stays that of the plain value)"
    )


class Merging:
    """A merge rule: every token weighs 1, and a slot's row is the sum of its tokens' rows.

    A rule of one's own overrides `weight`, or sets `additive = False` and overrides `combine`.
    """

    additive: bool = True
    """A slot is the sum of its tokens: conserved, whatever their order. The engine then adds all of a chunk at once."""
    joins: bool = True
    """Whether a token that founds nothing joins a slot (else it is dropped)."""
    weighs: Weigh = Weigh()
    """Where the weights count."""
    of: Of = "both"
    """What is merged: `both`, or `values` alone; then a slot's key and position are its founder's."""
    by_share: bool = False
    """Whether rows weigh what observed queries give them (`Observation`), slots and tokens alike."""
    cap: float | None = None
    """With `by_share`: how many times as much as a slot a row that joins it weighs at most; None: as much as it may."""
    learned: bool = False
    """Whether the weights are given to `attend` (learned by the layer)."""

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs besides keys and values."""
        return frozenset({Need.MERGE_WEIGHTS} if self.learned else ())

    def weight(self, keys: Tensor, weights: Tensor | None) -> Tensor | None:
        """Weight ≥ 0 of each token, [b, g, c], None for 1 each.

        keys [b, g, c, d]: as they arrived; weights [b, g, c]: the learned ones, None where not given.
        """
        return None

    def combine(self, slot: Tensor, token: Tensor) -> Tensor:
        """A slot's row after taking one token's row, both [n, columns]; used only where `additive` is False."""
        return slot + token


class MergingSpec(FamilySpec):
    """Declares a merge rule."""

    family: ClassVar[str] = "merging"

    @abstractmethod
    def build(self) -> Merging:
        """The rule."""


@register
class MeanSpec(MergingSpec):
    """Plain sums: each token weighs 1."""

    kind: Literal["mean"] = "mean"
    of: Of = Field(default="both", description="values: a slot keeps its founder's key and position")

    def build(self) -> Mean:
        return Mean(self.of)


class Mean(Merging):
    """Each token weighs 1."""

    def __init__(self, of: Of) -> None:
        self.of = of


@register
class DropSpec(MergingSpec):
    """A token that founds nothing is discarded."""

    kind: Literal["drop"] = "drop"

    def build(self) -> Drop:
        return Drop()


class Drop(Merging):
    """Slots hold their founder alone."""

    joins = False


@register
class WeightedMeanSpec(MergingSpec):
    """Weighted sums."""

    kind: Literal["weighted-mean"] = "weighted-mean"
    weight: Literal["learned", "key-norm", "share"] = Field(
        description="learned: the weights ≥ 0 given with the keys; key-norm: the key's Euclidean norm; "
        "share: what observed queries give a row, slots and tokens alike"
    )
    of: Of = Field(default="both", description="values: a slot keeps its founder's key and position")
    weigh: Weigh = Field(default=Weigh(), description="where the weight counts")
    cap: float | None = Field(
        default=None,
        gt=0,
        le=2**20,
        description="with weight share: how many times as much as its slot a row that joins weighs at most; readers to "
        "come may want the slot alone, however little it was read so far. Left out: as much as it was read",
    )

    @model_validator(mode="after")
    def _cap_of_shares(self) -> WeightedMeanSpec:
        if self.cap is not None and self.weight != "share":
            raise ValueError(f"cap is of weights by share, got weight {self.weight}; leave cap out")
        return self

    def build(self) -> WeightedMean:
        return WeightedMean(self.weight, self.weigh, self.of, self.cap)


class WeightedMean(Merging):
    """Each token enters with its weight where `weighs` says so."""

    def __init__(self, by: str, weighs: Weigh, of: Of, cap: float | None = None) -> None:
        self.learned, self.by_share, self.weighs, self.of = by == "learned", by == "share", weighs, of
        self.cap = cap

    def weight(self, keys: Tensor, weights: Tensor | None) -> Tensor | None:
        if self.by_share:  # 1 until they are merged
            return None
        return weights if self.learned else keys.norm(dim=-1)
