"""Chunking: the unit in which tokens leave the window."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field

from memkit.pieces.registry import FamilySpec, register
from memkit.whole import MOST

__all__ = ["BoundariesChunkerSpec", "Chunker", "ChunkerSpec", "FixedChunkerSpec"]


class Chunker:
    """Cuts positions into chunks of `size` tokens: chunk c holds positions c·size … (c + 1)·size − 1.

    given: whether a chunk ends before that where the caller says so (`attend(boundaries=…)`); it has `size` at most.
    """

    def __init__(self, size: int, given: bool = False) -> None:
        self.size, self.given = size, given


class ChunkerSpec(FamilySpec):
    """Declares a chunker."""

    family: ClassVar[str] = "chunker"

    @abstractmethod
    def build(self) -> Chunker:
        """The chunker."""


@register
class FixedChunkerSpec(ChunkerSpec):
    """Chunks of one size."""

    kind: Literal["fixed"] = "fixed"
    size: int = Field(default=256, ge=1, le=MOST, description="tokens per chunk (C), at least 1")

    def build(self) -> Chunker:
        return Chunker(self.size)


@register
class BoundariesChunkerSpec(ChunkerSpec):
    """Chunks end where the caller says: after sentences, messages, functions."""

    kind: Literal["boundaries"] = "boundaries"
    most: int = Field(
        default=256, ge=1, le=MOST, description="tokens that a chunk has at most: it ends there in any case"
    )

    def build(self) -> Chunker:
        return Chunker(self.most, given=True)
