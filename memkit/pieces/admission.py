"""Admission: which tokens of a leaving chunk found a slot of their own.

How many may is growth's decision; which ones is a score: the tokens with the highest score found, ties to the earliest.
Sinks found in any case and are no part of the choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memkit.pieces.chunk import ChunkContext, Count
from memkit.pieces.registry import FamilySpec, register

__all__ = [
    "Admission",
    "AdmissionSpec",
    "NoAdmissionSpec",
    "NoveltySpec",
    "RecencySpec",
    "StrideSpec",
]


class Admission(ABC):
    """Says how much each token of a chunk deserves a slot."""

    compares: ClassVar[bool] = False
    """Whether the score looks at the slots. In an empty memory token 0 then founds the first slot, and the rest are
    compared with it."""

    @abstractmethod
    def score(self, chunk: ChunkContext) -> Tensor:
        """How much each token deserves a slot, the highest first; broadcastable to [b, g, c].

        Those that found in any case (`chunk.sink_tokens`) may be given any score.
        """


class AdmissionSpec(FamilySpec):
    """Declares an admission."""

    family: ClassVar[str] = "admission"

    @abstractmethod
    def build(self) -> Admission | None:
        """The admission; None where the routing says who founds."""


@register
class NoveltySpec(AdmissionSpec):
    """The tokens that the memory stands for least: lowest best similarity to any slot (arXiv 2605.09877)."""

    kind: Literal["novelty"] = "novelty"

    def build(self) -> Novelty:
        return Novelty()


class Novelty(Admission):
    """score_j = −max_i similarity(key_j, slot_i), sinks included."""

    compares = True

    def score(self, chunk: ChunkContext) -> Tensor:
        return -chunk.redundancy


@register
class RecencySpec(AdmissionSpec):
    """The last tokens of the chunk."""

    kind: Literal["recency"] = "recency"

    def build(self) -> Recency:
        return Recency()


class Recency(Admission):
    """score_j = j."""

    def score(self, chunk: ChunkContext) -> Tensor:
        return chunk.offsets


@register
class StrideSpec(AdmissionSpec):
    """Tokens at even distances: offsets ⌊i·C/g⌋ for i = 0 … g − 1."""

    kind: Literal["stride"] = "stride"

    def build(self) -> Stride:
        return Stride()


class Stride(Admission):
    """score_j = 1 where j = ⌊i·C/g⌋ for a whole i, else 0; j, C and g count what is no sink."""

    def score(self, chunk: ChunkContext) -> Tensor:
        offsets, new = chunk.offsets - chunk.sink_tokens, chunk.new_slots - chunk.sink_tokens
        size = _at_least_one(chunk.keys.shape[2] - chunk.sink_tokens)
        turn = -(-offsets * new // size)  # the first i with ⌊i·C/g⌋ ≥ offset
        return (turn * size // _at_least_one(new) == offsets).long()


@register
class NoAdmissionSpec(AdmissionSpec):
    """Nobody is admitted by a score; the routing says who founds (`segment`: the first token of each run)."""

    kind: Literal["none"] = "none"

    def build(self) -> None:
        return None


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
