"""Admission: which tokens of a leaving chunk found a slot of their own.

How many may is growth's decision; which ones is an order: the tokens with the lowest priority found, ties to the
earliest. Sinks found in any case and are no part of the choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memkit.pieces.registry import FamilySpec, register

__all__ = [
    "Admission",
    "AdmissionSpec",
    "NoAdmissionSpec",
    "NoveltySpec",
    "RecencySpec",
    "StrideSpec",
]

Count = int | Tensor
"""A whole number for all rows, or one per row as a tensor [b, 1, 1]."""


class Admission(ABC):
    """Orders the tokens of a chunk by how much they deserve a slot."""

    compares: ClassVar[bool] = False
    """Whether the order looks at how well the slots there are already stand for a token."""

    @abstractmethod
    def priority(self, offsets: Tensor, free: Count, grant: Count, redundancy: Tensor | None) -> Tensor:
        """The order in which tokens found, the lowest first, broadcastable to [b, g, c].

        offsets [c]: each token's place among those that may be chosen (negative for those that found anyway);
        free: how many may be chosen; grant ≤ free: how many will be;
        redundancy [b, g, c]: each token's best similarity to the slots there are (None unless `compares`).
        """


class AdmissionSpec(FamilySpec):
    """Declares an admission."""

    family: ClassVar[str] = "admission"

    @abstractmethod
    def build(self) -> Admission | None:
        """The admission; None where nobody is admitted."""


@register
class NoveltySpec(AdmissionSpec):
    """The tokens that the memory stands for least: lowest best similarity to any slot (arXiv 2605.09877)."""

    kind: Literal["novelty"] = "novelty"

    def build(self) -> Novelty:
        return Novelty()


class Novelty(Admission):
    """priority_j = max_i similarity(key_j, slot_i), sinks included."""

    compares = True

    def priority(self, offsets: Tensor, free: Count, grant: Count, redundancy: Tensor | None) -> Tensor:
        assert redundancy is not None
        return redundancy


@register
class RecencySpec(AdmissionSpec):
    """The last tokens of the chunk."""

    kind: Literal["recency"] = "recency"

    def build(self) -> Recency:
        return Recency()


class Recency(Admission):
    """priority_j = −j."""

    def priority(self, offsets: Tensor, free: Count, grant: Count, redundancy: Tensor | None) -> Tensor:
        return -offsets


@register
class StrideSpec(AdmissionSpec):
    """Tokens at even distances: offsets ⌊i·C/g⌋ for i = 0 … g − 1."""

    kind: Literal["stride"] = "stride"

    def build(self) -> Stride:
        return Stride()


class Stride(Admission):
    """priority_j = 0 where j = ⌊i·C/g⌋ for a whole i, else 1."""

    def priority(self, offsets: Tensor, free: Count, grant: Count, redundancy: Tensor | None) -> Tensor:
        size = _at_least_one(free)
        turn = -(-offsets * grant // size)  # the first i with ⌊i·C/g⌋ ≥ offset
        return (turn * size // _at_least_one(grant) != offsets).long()


@register
class NoAdmissionSpec(AdmissionSpec):
    """Nobody is admitted here; the routing founds slots itself (`segment`)."""

    kind: Literal["none"] = "none"

    def build(self) -> None:
        return None


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
